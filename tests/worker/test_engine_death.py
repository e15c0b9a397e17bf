"""An engine that dies says why in the run's error: the supervisor reads its log."""

import pytest

from tests.ports import free_port
from tests.worker.stands import Host, engine, events, stage, trainer


@pytest.mark.parametrize(
    ("end", "told"),
    [
        (
            "sys.exit(1)",
            "stage rl: engine-0 ended with exit code 1. Another process uses the port.",
        ),
        (
            "os.kill(os.getpid(), 9)",
            "stage rl: engine-0 was ended by SIGKILL. Another process uses the port.",
        ),
    ],
)
def test_the_error_has_the_reason_and_the_fix(host: Host, end: str, told: str) -> None:
    """Goal: the message that the user sees names cause and fix; SGLang ends itself with SIGKILL whatever it was. Red
    with the log not read."""
    said = "[Errno 98] error while attempting to bind on address ('127.0.0.1', 30771): address already in use"
    dying = f"import os, sys\nprint({said!r}, flush=True)\n{end}"
    run = host.finish(stage("rl", trainer("print('never')"), engine(free_port(), dying)))
    (error,) = events(run, "error")
    assert error["window"] == "engine-0" and error["message"].startswith(told), error["message"]
    assert "engine.sglang_port" in error["message"]
