"""`deploy logs`: what a window of a run's tmux session showed, here from where it was printed last."""

import contextlib
import threading

from rollouts.plain_files import read_plain
from rollouts.remote.errors import DeployError
from rollouts.remote.run.connection import RetryPolicy, RunConnection
from rollouts.remote.run.follow import apply, follow, tail
from rollouts.remote.run.mirror import Mirror
from rollouts.remote.run.open_run import open_run
from rollouts.remote.run.other_hosts import names_of, on_host
from rollouts.remote.watch_run import why_gone_of
from rollouts.view.answer import Answer
from rollouts.view.log_writer import HostLogWriter, LogWriter
from rollouts.view.screen import Screen

OTHERS_S = 10.0  # after the first host's end: for the last lines of another


def logs(
    run_id: str, screen: Screen, *, remote: str | None, window: str, until_end: bool
) -> Answer:
    """Print what a tmux window showed, from its beginning (`deploy logs RUN`); with -f until the run's end.

    `window` may be WINDOW@HOST, of a run on several hosts. Without a host, -f prints the window of each of them.
    """
    if screen.as_json and until_end:
        raise DeployError(
            "--json prints one document, and -f has no end.", fix="leave out one of the two"
        )
    window, _, host = window.partition("@")
    with open_run(run_id, remote, needs_files=True) as run, contextlib.ExitStack() as stack:
        connection = on_host(run.connection, host, stack) if host else run.connection
        file, names = f"logs/{window}.log", names_of(run.entry)
        if until_end and names and not host:
            mirror = _follow_all(connection, screen, file, names)
        else:
            mirror = _bring_log(connection, screen, file, LogWriter(), until_end=until_end)
        for note in mirror.left_out_notes():
            screen.remark(f"note: {note}")
        windows, logged = _windows(mirror)
        if window in windows and window not in logged:
            screen.remark(f"note: {window} has printed nothing so far")
        if window not in windows:
            raise DeployError(
                f"{run.entry.run_id} has no window {window!r}.",
                found=f"windows: {', '.join(windows) or 'none yet'}",
                started=True,
            )
    is_read = screen.as_json and window in logged
    text = read_plain(mirror.run.log(window)).decode(errors="replace") if is_read else ""
    return Answer(
        {"run_id": run.entry.run_id, "window": window, "windows": windows, "text": text}, None
    )


def _follow_all(first: RunConnection, screen: Screen, file: str, names: list[str]) -> Mirror:
    """Print the log of all hosts as it comes, with their names, to the run's end; return the first one's mirror."""

    def follow_one(rank: int) -> None:
        try:
            with contextlib.ExitStack() as stack:
                there, writer = on_host(first, str(rank), stack), HostLogWriter(names[rank])
                _bring_log(there, screen, file, writer, until_end=True)
        except DeployError as error:
            screen.remark(f"note: {names[rank]}: {error}")

    threads = [
        threading.Thread(target=follow_one, args=[rank], daemon=True)
        for rank in range(1, len(names))
    ]
    for thread in threads:
        thread.start()
    mirror = _bring_log(first, screen, file, HostLogWriter(names[0]), until_end=True)
    for thread in threads:
        thread.join(OTHERS_S)
    return mirror


def _bring_log(
    connection: RunConnection, screen: Screen, file: str, write_log: LogWriter, *, until_end: bool
) -> Mirror:
    """Bring what the host has, and print the log as it comes, unless JSON is asked for."""
    mirror = Mirror(connection.entry.mirror)

    def on_file(changed: str) -> None:
        if changed == file and not screen.as_json:
            write_log(mirror.new_text(file))

    on_file(file)
    if until_end:
        policy = RetryPolicy.while_it_lasts(why_gone_of(connection.entry))
        follow(connection, mirror, on_file, screen.say, policy)
        write_log.close()
        return mirror
    for message in tail(connection, mirror, until_end=False):
        if changed := apply(mirror, message):
            on_file(changed)
    return mirror


def _windows(mirror: Mirror) -> tuple[list[str], set[str]]:
    """Return the windows that the run has had, and those of them that printed something."""
    logged = {path.stem for path in mirror.run.path.glob("logs/*.log")}
    named = {
        row["window"] for row in mirror.rows("events.jsonl") if isinstance(row.get("window"), str)
    }
    return sorted(logged | named), logged
