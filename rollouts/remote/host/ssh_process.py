"""A command over the ssh program, as a channel: ssh_channel.py reads it as it reads paramiko's."""

import contextlib
import os
import subprocess
from collections.abc import Sequence

FAILED = 255  # the exit code of ssh itself; a command's own is between its marks
END_WAIT_S = 2.0


class ProcessChannel:
    """One ssh process. `exit_status` is -1 where ssh itself failed: the connection was lost."""

    def __init__(self, argv: Sequence[str]) -> None:
        pipe = subprocess.PIPE
        # A session of its own: Ctrl-C is for us
        self._process = subprocess.Popen(
            argv, bufsize=0, stdin=pipe, stdout=pipe, stderr=pipe, start_new_session=True
        )

    def recv(self, nbytes: int) -> bytes:
        assert self._process.stdout is not None
        return os.read(self._process.stdout.fileno(), nbytes)

    def recv_stderr(self, nbytes: int) -> bytes:
        assert self._process.stderr is not None
        return os.read(self._process.stderr.fileno(), nbytes)

    def sendall(self, s: bytes) -> None:
        assert self._process.stdin is not None
        view = memoryview(s)
        while view:
            view = view[self._process.stdin.write(view) :]

    def shutdown_write(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()

    @property
    def status_event(self) -> "ProcessChannel":
        return self

    def wait(self, timeout: float | None = None) -> bool:
        """Return whether it has ended."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(timeout)
        return self._process.poll() is not None

    @property
    def exit_status(self) -> int:
        code = self._process.poll()
        return -1 if code is None or code < 0 or code == FAILED else code

    def close(self) -> None:
        """End it: the host's side ends with its connection."""
        if self._process.poll() is None:
            self._process.terminate()
            if not self.wait(END_WAIT_S):
                self._process.kill()
                self._process.wait()
