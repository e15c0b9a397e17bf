"""An engine that misbehaves as no healthy one does, played by a small HTTP server."""

import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


class Threaded(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False  # connections that clients keep
    request_queue_size = 256


class Scripted:
    """An HTTP server that answers every route with 200 and {"success": true}, but for `answers`; it notes the calls.

    With `together` it answers once so many requests are there."""

    def __init__(self, answers: dict[str, tuple[int, str]], *, together: int = 1) -> None:
        self.calls: list[str] = []
        self.connections = 0  # that were opened
        self.together = threading.Barrier(together)
        script = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            disable_nagle_algorithm = True

            def setup(self) -> None:
                super().setup()
                script.connections += 1

            def do_POST(self) -> None:
                self.rfile.read(int(self.headers.get("content-length") or 0))
                route = self.path.split("?")[0]
                script.calls.append(route)
                script.together.wait(timeout=200)
                status, text = answers.get(route, (200, '{"success": true}'))
                self.send_response(status)
                self.send_header("content-length", str(len(text)))
                self.end_headers()
                self.wfile.write(text.encode())

            do_GET = do_POST

            def log_message(self, *args: Any) -> None:
                pass

        self.server = Threaded(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"

    def __enter__(self) -> "Scripted":
        threading.Thread(target=self.server.serve_forever, args=(0.01,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.server.shutdown()
        self.server.server_close()
