"""The five things that a run asks of tmux. Standard library only.

Commands are given as separate arguments, which tmux executes without a shell, so neither quoting nor the user's
default shell matters. Session names are matched exactly (`=name`). What in a user's tmux.conf would end a detached
session or keep dead windows is switched off for the run's own session.
"""

import os
import shutil
import subprocess
from collections.abc import Collection, Sequence
from pathlib import Path

TMUX_TIMEOUT_S = 10.0
WINDOW_SIZE = ("-x", "200", "-y", "50")  # without a terminal tmux would take 80x24


class TmuxError(Exception):
    """tmux is missing, failed or did not answer. The message names the fix."""


def start_session(
    run_id: str, window: str, command: Sequence[str], *, cwd: Path, hide: Collection[str]
) -> None:
    """Start a detached session with one window. `hide` names variables that must not reach the tmux server."""
    _tmux(
        *(
            "new-session",
            "-d",
            "-s",
            run_id,
            "-n",
            window,
            *WINDOW_SIZE,
            "-c",
            str(cwd),
            *command,
            ";",
        ),
        *("set-option", "-t", f"={run_id}:", "destroy-unattached", "off", ";"),
        *("set-window-option", "-t", f"={run_id}:={window}", "remain-on-exit", "off"),
        hide=hide,
    )


def open_window(run_id: str, window: str, command: Sequence[str], *, cwd: Path) -> int:
    """Add a window to the run's session, from a process inside it. Returns the process id of `command`."""
    text = _tmux(
        *(
            "new-window",
            "-d",
            "-P",
            "-F",
            "#{pane_pid}",
            "-t",
            f"={run_id}:",
            "-n",
            window,
            "-c",
            str(cwd),
        ),
        *(
            *command,
            ";",
            "set-window-option",
            "-t",
            f"={run_id}:={window}",
            "remain-on-exit",
            "off",
        ),
        inside=True,
    )
    return int(text)


def has_session(run_id: str) -> bool:
    try:
        _tmux("has-session", "-t", f"={run_id}")
    except TmuxError:
        return False
    return True


def pane_processes(run_id: str) -> list[int]:
    """Return the process of each window of the session of that name; [] where there is none."""
    try:
        text = _tmux("list-panes", "-s", "-t", f"={run_id}", "-F", "#{pane_pid}")
    except TmuxError:
        return []
    return [int(line) for line in text.splitlines() if line.isdigit()]


def window_names(run_id: str) -> list[str]:
    """Return the windows of the run's session, from a process inside it. Raises TmuxError."""
    return _tmux(
        "list-windows", "-t", f"={run_id}", "-F", "#{window_name}", inside=True
    ).splitlines()


def kill_session(run_id: str) -> None:
    """End the session if there is one; each of its windows gets SIGHUP."""
    if shutil.which("tmux") and has_session(run_id):
        try:
            _tmux("kill-session", "-t", f"={run_id}")
        except TmuxError:
            # else it ended by itself meanwhile, as it does once its last process has ended
            if has_session(run_id):
                raise


def _tmux(*arguments: str, hide: Collection[str] = (), inside: bool = False) -> str:
    """Run tmux and return its output. From outside it is always the user's default server, that of plain `tmux`."""
    dropped = {*hide} if inside else {*hide, "TMUX", "TMUX_PANE"}
    environment = {name: value for name, value in os.environ.items() if name not in dropped}
    try:
        done = subprocess.run(
            ["tmux", *arguments],
            env=environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=TMUX_TIMEOUT_S,
            check=False,
        )
    except FileNotFoundError:
        raise TmuxError(
            "tmux is not installed on this host. Install it (Debian: apt-get install tmux)."
        ) from None
    except subprocess.TimeoutExpired:
        raise TmuxError(
            f"tmux {arguments[0]} did not answer within {TMUX_TIMEOUT_S:g} s. See `tmux ls`."
        ) from None
    if done.returncode != 0:
        said = done.stderr.strip() or f"exit code {done.returncode}"
        raise TmuxError(f"tmux {arguments[0]} failed: {said}. See `tmux ls`.")
    return done.stdout.strip()
