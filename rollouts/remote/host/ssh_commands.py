"""Commands over any channel of SSH's: framed, bounded, with a time limit. Both clients share it."""

import shlex
import time
from abc import ABC, abstractmethod
from collections.abc import Sequence

from rollouts.remote.errors import TransportError
from rollouts.remote.host.bounded import Collected
from rollouts.remote.host.framing import for_any_shell, framed_line, new_frame
from rollouts.remote.host.ssh_channel import ChannelOutput, CommandChannel, SSHStream
from rollouts.remote.host.ssh_rsync import HOST_ALIAS
from rollouts.remote.host.transport import Completed, Stream


class SSHCommands(ABC):
    """Run and follow commands; a transport over SSH has these from here."""

    target: str

    def _start(
        self, argv: Sequence[str], cwd: str | None, stdin: bytes, *, close_stdin: bool
    ) -> tuple[CommandChannel, ChannelOutput]:
        channel, frame = self.open_channel(), new_frame()
        return channel, ChannelOutput(
            channel, framed_line(argv, cwd, frame), frame, stdin, close_stdin=close_stdin
        )

    @abstractmethod
    def open_channel(self) -> CommandChannel:
        """Return a channel with `sh -s` on the host. Raises TransportError."""

    @abstractmethod
    def ssh_argv(self) -> list[str]:
        """Return the ssh command with this host's settings, of which HOST_ALIAS is the host. Raises TransportError."""

    def rsync_options(self) -> list[str]:
        return self.rsync_over(*self.ssh_argv())

    def rsync_over(self, *ssh_argv: str) -> list[str]:
        """Return what rsync needs to reach the host by that command."""
        return ["-e", shlex.join(ssh_argv), "--rsync-path=env LC_ALL=C rsync"]

    def shell_argv(self, line: str, *, terminal: bool) -> list[str]:
        # else it tells of each key file that is not there
        quiet = ("-o", "LogLevel=ERROR", "-t" if terminal else "-T")
        return [*self.ssh_argv(), *quiet, HOST_ALIAS, for_any_shell(line)]

    def run(
        self, argv: Sequence[str], *, stdin: bytes = b"", cwd: str | None = None, timeout_s: float
    ) -> Completed:
        channel, output = self._start(argv, cwd, stdin, close_stdin=True)
        deadline = time.monotonic() + timeout_s
        stdout = Collected(self.target)
        try:
            while (data := output.next(deadline - time.monotonic())) != b"":
                if data is None:
                    raise TransportError(
                        f"{self.target}: {shlex.join(argv)[:200]}: no end after {timeout_s:.0f} s, given up",
                        found=output.noise.decode(errors="replace")[-500:],
                        lost=True,
                    )
                stdout.add(data)
            code, stderr = output.end(self.target)
            return Completed(code, stdout.all(), stderr, output.noise)
        finally:
            channel.close()

    def stream(self, argv: Sequence[str], *, first_line: bytes, cwd: str | None = None) -> Stream:
        channel, output = self._start(argv, cwd, first_line, close_stdin=False)
        return SSHStream(self.target, channel, output)
