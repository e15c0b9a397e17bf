"""Stands in for the engine: answers 200 to everything, once the file STAND_IN_ENGINE_WAIT exists."""

import http.server
import os
import sys
import time


class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.send_response(200)
        self.end_headers()

    def log_message(self, *words: object) -> None:
        """The embedded engine prints nothing either."""


while (wait := os.environ.get("STAND_IN_ENGINE_WAIT")) and not os.path.exists(wait):
    time.sleep(0.02)
host = sys.argv[sys.argv.index("--host") + 1]
port = int(sys.argv[sys.argv.index("--port") + 1])
http.server.ThreadingHTTPServer((host, port), Handler).serve_forever()
