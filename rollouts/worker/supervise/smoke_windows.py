"""The smoke test: what is tried on this host once its environments are there, before any stage. Standard library only.

Each check is a process with a window of its own; they run side by side, and one that passed leaves a marker in its
environment, named by what was tried, this host and its driver: so a second run does not repeat it.
"""

import hashlib
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

from rollouts import run_dir
from rollouts.plain_files import read_plain
from rollouts.run_dir import SMOKE_STAGE, LaunchPlan, RunDir, SmokeCheck
from rollouts.worker import tmux
from rollouts.worker.environments.installer import BootstrapError
from rollouts.worker.processes import POLL_S
from rollouts.worker.supervise.console import say
from rollouts.worker.supervise.open_window import OpenWindow, close_windows, open_window
from rollouts.worker.supervise.without_tmux import StartError

DRIVER_FILE = Path("/proc/driver/nvidia/version")
LOG_TAIL_LINES = 50
HANGS = (
    "On a GPU host this is mostly a driver that hangs: see whether `nvidia-smi` answers there, look for `NVRM: Xid` in"
    " `dmesg`, and reboot the host or take other cards"
)


class Event(Protocol):
    def __call__(self, kind: str, **fields: Any) -> None: ...


def smoke_test(
    run: RunDir,
    plan: LaunchPlan,
    *,
    event: Event,
    tick: Callable[[], None],
    beat: Callable[[], None],
) -> None:
    """Run the plan's checks that have not passed here before. Nothing of them is left on return.

    Raises BootstrapError for the first that fails, or does not end in time; and what `tick` raises, which is called in
    every wait. `beat` is called while they are ended.
    """
    due = [check for check in plan.smoke if not _marker(check).is_file()]
    if not plan.smoke:
        return
    if not due:
        event("smoke_test_ended", action="reused", seconds=0.0, parts=_parts_before(plan.smoke))
        say("smoke test: passed here before")
        return
    started = time.monotonic()
    event("smoke_test_started", windows=[check.process.window for check in due])
    parts = _run(run, plan, due, event=event, tick=tick, beat=beat)
    for check in due:
        _write_marker(check, parts[check.process.window])
    seconds = round(time.monotonic() - started, 3)
    event("smoke_test_ended", action="done", seconds=seconds, parts=parts)
    say(f"smoke test: passed after {seconds:.1f} s: {json.dumps(parts)}")


def try_network(
    run: RunDir,
    plan: LaunchPlan,
    *,
    event: Event,
    tick: Callable[[], None],
    beat: Callable[[], None],
) -> None:
    """Try the way between the hosts of a run: one process on each, all at once. Raises as `smoke_test`."""
    assert plan.network is not None and plan.group is not None
    found = _run(run, plan, [plan.network], event=event, tick=tick, beat=beat)[
        plan.network.process.window
    ]
    if plan.group.leads:
        names = [host.name for host in plan.group.hosts if host.trains]
        event("network_tested", hosts=names, **found)
        say(f"network between the hosts: {json.dumps(found)}")


def _run(
    run: RunDir,
    plan: LaunchPlan,
    due: list[SmokeCheck],
    *,
    event: Event,
    tick: Callable[[], None],
    beat: Callable[[], None],
) -> dict[str, dict[str, Any]]:
    """Run checks side by side; return what each reports of its parts. Nothing of them is left on return."""
    started = time.monotonic()
    windows: list[OpenWindow] = []
    try:
        for check in due:
            windows.append(_open(run, plan, check))
        _await(due, windows, started, tick)
    finally:
        left = close_windows(run, windows, grace_s=plan.stop_grace_s, tick=beat)
        if left:
            event(
                "note",
                message=f"smoke test: still there after SIGKILL, the kernel holds them: {left}",
            )
    return {check.process.window: _report(run, check).get("parts", {}) for check in due}


def _open(run: RunDir, plan: LaunchPlan, check: SmokeCheck) -> OpenWindow:
    say(f"smoke test: starting {check.process.window} on {check.subject}")
    try:
        return open_window(run, plan, SMOKE_STAGE, check.process, may_end=True)
    except (tmux.TmuxError, StartError) as error:
        raise BootstrapError(
            f"smoke test: cannot open a window for {check.process.window}: {error}"
        ) from None


def _await(
    due: list[SmokeCheck], windows: list[OpenWindow], started: float, tick: Callable[[], None]
) -> None:
    while not all(window.has_succeeded() for window in windows):
        tick()
        for check, window in zip(due, windows, strict=True):
            if window.has_failed():
                raise _failure(check, window)
            if time.monotonic() - started > check.timeout_s and not window.has_succeeded():
                raise _too_slow(check, window)
        time.sleep(POLL_S)


def _failure(check: SmokeCheck, window: OpenWindow) -> BootstrapError:
    """Return why it failed in its own words, which name build, driver and device; else in ours: a crash has no
    words."""
    said, is_sentence = window.cause()
    message = said
    if not is_sentence:
        doing = _doing(window.run, check)
        message = ". ".join(
            filter(None, (f"smoke test: {window.describe_end()}{doing}, on {check.subject}", said))
        )
    return BootstrapError(
        message, window.last_words()[-LOG_TAIL_LINES:], window=check.process.window
    )


def _too_slow(check: SmokeCheck, window: OpenWindow) -> BootstrapError:
    name = check.process.window
    message = (
        f"smoke test: {name} was not over after {check.timeout_s:g} s{_doing(window.run, check)}, on {check.subject}."
        f" {HANGS}."
    )
    return BootstrapError(message, window.last_words()[-LOG_TAIL_LINES:], window=name)


def _doing(run: RunDir, check: SmokeCheck) -> str:
    doing = _report(run, check).get("doing")
    return f", in its part {doing!r}" if doing else ""


def _report(run: RunDir, check: SmokeCheck) -> dict[str, Any]:
    try:
        found = json.loads(read_plain(run.smoke_report(check.process.window)))
    except (OSError, ValueError):  # it did not come so far
        return {}
    return found if isinstance(found, dict) else {}


def _marker(check: SmokeCheck) -> Path:
    """Of this host and its driver as they are now: homes are shared, and a driver is updated."""
    try:
        driver = DRIVER_FILE.read_text()
    except OSError:
        driver = ""
    here = json.dumps([run_dir.host_identity()["name"], driver])
    return Path(f"{check.marker}-{hashlib.sha256(here.encode()).hexdigest()[:16]}.json")


def _write_marker(check: SmokeCheck, parts: dict[str, Any]) -> None:
    marker = _marker(check)
    try:
        run_dir.write_json_atomic(
            marker, {"subject": check.subject, "parts": parts, "passed_at": time.time()}
        )
    except OSError as error:  # the next run tries again
        say(f"smoke test: cannot write {marker}: {error}")


def _parts_before(checks: list[SmokeCheck]) -> dict[str, Any]:
    """Return the seconds of the run that made the markers."""
    found = {}
    for check in checks:
        try:
            found[check.process.window] = json.loads(read_plain(_marker(check)))["parts"]
        except (OSError, ValueError, KeyError, TypeError):
            found[check.process.window] = {}
    return found
