"""The verbs of `deploy` that do something: each gathers, decides, does, and prints. deploy.py only parses.

Every verb returns the process's exit code and raises DeployError for what it cannot do. looks.py has those that only
look.
"""

import codecs
import contextlib
import os
import secrets
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rollouts.config import Config
from rollouts.plain_files import read_plain
from rollouts.remote.errors import DeployError, Problem, TransportError
from rollouts.remote.host.facts import HostFacts, gather_facts
from rollouts.remote.host.open import open_transport
from rollouts.remote.host.read_answer import read_answer
from rollouts.remote.host.sending import sent_program
from rollouts.remote.host.transport import LOCAL_TARGET, Transport
from rollouts.remote.local_faults import Interrupted, Standing, standing
from rollouts.remote.looks import last_seen
from rollouts.remote.plan import Plan, asked_paths, asked_ports, make_plan
from rollouts.remote.read_config import read_config
from rollouts.remote.repository import find_repository, read_code
from rollouts.remote.run import registry
from rollouts.remote.run.execute import execute
from rollouts.remote.run.mirror import Mirror
from rollouts.remote.run.open_run import known, open_run, write_note
from rollouts.remote.run.registry import Entry
from rollouts.remote.run.watch import (
    Link,
    Patience,
    Result,
    apply,
    final_pull,
    follow,
    left_out_notes,
    pull,
    tail,
    watch,
)
from rollouts.remote.texts import failure_message, forgotten_text, how_to_go_on, plan_text, result_text
from rollouts.run_dir import FINAL_STATES
from rollouts.view.display import make_reporter, print_json, show
from rollouts.view.escape import escaped
from rollouts.view.reporter import Reporter

DETACHED = 130  # as a shell says of Ctrl-C
STOP_MARGIN_S = 60.0


def deploy(
    config_path: str,
    *,
    remote: str | None,
    plan_only: bool,
    as_json: bool,
    detach: bool,
    run_id: str | None,
    accept_new_host_key: bool,
    busy_ok: bool = False,
) -> int:
    """`deploy CONFIG`: plan, send, launch, watch; the job's exit code."""
    with standing() as now:
        config = read_config(config_path)
        root = find_repository(Path.cwd())
        run_id = run_id or f"{config.output.experiment_name}-{time.strftime('%Y%m%d-%H%M%S')}-{secrets.token_hex(2)}"
        with contextlib.closing(open_transport(remote, accept_new_host_key=accept_new_host_key)) as transport:
            facts = gather_facts(
                transport, ports=asked_ports(config), paths=asked_paths(config), run_id=run_id, check_way=True
            )
            code = read_code(root, config)
            plan = make_plan(
                config,
                facts,
                code,
                target=remote or LOCAL_TARGET,
                run_id=run_id,
                local_dir=str(mirror_dir(config, root, run_id)),
                secrets_set=[name for name in config.host.secrets if os.environ.get(name)],
                busy_ok=busy_ok,
            )
            if plan_only:
                print_json(plan.to_json()) if as_json else show(plan_text(plan))
            if problems := [*plan.problems, *_local_problems(plan)]:
                raise DeployError.of(problems)
            if plan_only:
                return 0
            for warning in plan.warnings:
                _warn(warning, as_json=as_json)
            entry = registry.register(plan, config, root, code.record(), now=time.time())
            now.run_id, now.target, now.reached = entry.run_id, entry.target, "registered"
            return _run(entry, config, facts, transport, now, as_json=as_json, detach=detach)


def _warn(warning: str, *, as_json: bool) -> None:
    if as_json:
        print_json({"type": "progress", "phase": "warning", "message": warning})
    else:
        show(f"warning: {warning}")


def _run(
    entry: Entry,
    config: Config,
    facts: HostFacts,
    transport: Transport,
    now: Standing,
    *,
    as_json: bool,
    detach: bool,
) -> int:
    """From a registered run to its end, or to where the user detaches."""
    with _reporting(entry, now, as_json=as_json) as reporter:
        reporter.say("run", f"{entry.run_id} on {entry.target}")
        _launch(entry, config, facts.path, transport, reporter=reporter, now=now)
        if not detach:
            return _watch_to_end(Link(entry, python_of(facts), transport), reporter, now, as_json=as_json)
        reporter.close()
        write_note(entry, now=time.time(), followed_by=None)
        if as_json:
            print_json({"type": "result", "run_id": entry.run_id, "state": "launched", "exit_code": None})
        else:
            show(how_to_go_on(entry))
        return 0


def _launch(
    entry: Entry, config: Config, path: str, transport: Transport, *, reporter: Reporter, now: Standing
) -> None:
    """Send and start it. Raises DeployError, and keeps why for `deploy ls`; `now` says whether it may have started."""

    def say(phase: str, text: str) -> None:
        if phase == "launch":
            now.reached = "launching"
        reporter.say(phase, text)

    try:
        execute(entry, config, transport, path, say)
    except DeployError as error:
        if not isinstance(error, TransportError) and not error.started:
            now.reached = "registered"  # the launcher answered that it started nothing
        if now.reached == "registered":
            with contextlib.suppress(OSError):
                registry.note_reason(entry, "\n".join(problem.text() for problem in error.problems)[:3000])
        raise
    registry.mark_launched(entry)
    now.reached = "launched"


def attach(run_id: str, *, remote: str | None, as_json: bool, accept_new_host_key: bool) -> int:
    """`deploy attach RUN`: go on where the last deploy left off, whatever it had come to."""
    with open_run(run_id, remote, accept_new_host_key=accept_new_host_key) as run:
        entry, now = run.entry, run.now
        if run.trace == "gone":
            raise run.missing()
        if run.trace in ("never launched", "being launched"):
            now.reached = "nothing" if entry.adopted else "registered"
            config = registry.planned(entry)
            registry.fill_mirror(entry)
            return _run(entry, config, run.facts, run.transport, now, as_json=as_json, detach=False)
        with _reporting(entry, now, as_json=as_json) as reporter:
            return _watch_to_end(Link(entry, run.python, run.transport), reporter, now, as_json=as_json)


@contextlib.contextmanager
def _reporting(entry: Entry, now: Standing, *, as_json: bool) -> Iterator[Reporter]:
    """A reporter, closed at the end; Ctrl-C while a run is followed says how to go on, and exits."""
    reporter = make_reporter(as_json=as_json)
    try:
        yield reporter
    except KeyboardInterrupt:
        reporter.close()
        if now.reached != "launched":
            raise
        with contextlib.suppress(OSError, DeployError):
            write_note(entry, now=time.time(), followed_by=None)
        if as_json:
            print_json({"type": "result", "run_id": entry.run_id, "state": "detached", "exit_code": None})
        else:
            show(f"\ndetached. {how_to_go_on(entry)}")
        raise SystemExit(DETACHED) from None
    finally:
        reporter.close()


def _watch_to_end(link: Link, reporter: Reporter, now: Standing, *, as_json: bool) -> int:
    entry, patience = link.entry, Patience()
    write_note(entry, now=time.time(), followed_by=os.getpid())
    now.reached = "launched"
    result = watch(link, reporter, patience)
    now.reached = "ended"
    notes, pull_error = list(result.notes), None

    def say(phase: str, text: str) -> None:
        notes.append(text) if phase == "note" and text not in notes else reporter.say(phase, text)

    try:
        final_pull(link, say, patience)
    except DeployError as error:  # the job's end is told first, and the run's files are still on the host
        pull_error = error
        pull_error.started = True
    reporter.close()
    with contextlib.suppress(OSError, DeployError):
        complete = pull_error is None and result.state in FINAL_STATES
        write_note(entry, now=time.time(), followed_by=None, complete=complete)
    code = result.exit_code if result.exit_code is not None else 1
    if pull_error is not None and code == 0:
        code = 1
    if as_json:
        print_json(_result_json(entry, result, code, pull_error, notes))
    else:
        print(result_text(entry, result, code, pull_error, notes), flush=True)  # escaped where it is put together
    return code


def stop(run_id: str, *, remote: str | None, as_json: bool) -> int:
    """`deploy stop RUN`: end its processes on the host. 0 once it is over, however it ended."""
    with open_run(run_id, remote) as run:
        entry = run.entry
        argv, program = sent_program(run.python, "rollouts.worker.stop", entry.run_path)
        grace_s = entry.stop_grace_s
        grace_s = STOP_MARGIN_S if grace_s is None else grace_s
        done = run.transport.run(argv, stdin=program, timeout_s=2 * grace_s + STOP_MARGIN_S)
        if done.returncode != 0 and run.row is None:
            raise run.missing()
        if done.returncode != 0:
            raise DeployError(f"{entry.run_id} could not be stopped.", found=done.err[-2000:], started=True)
        fields = {"state": str, "exit_code": int | None}
        said = read_answer(entry.target, "the stop", done.out, fields, started=True)
        answer = {"state": said["state"], "exit_code": said["exit_code"]}
    if as_json:
        print_json({"run_id": entry.run_id, **answer})
    else:
        show(
            f"{entry.run_id}: {answer['state']}, exit code {answer['exit_code']}\nresults   deploy pull {entry.run_id}"
        )
    return 0


def pull_run(run_id: str, *, remote: str | None, as_json: bool) -> int:
    """`deploy pull RUN`: all results that there are now, verified."""
    with open_run(run_id, remote, needs_files=True) as run:
        entry, notes = run.entry, []

        def say(phase: str, text: str) -> None:
            notes.append(text) if phase == "note" else print(f"{phase}: {escaped(text)}", file=sys.stderr, flush=True)

        try:
            state = pull(Link(entry, run.python, run.transport), say)
        finally:
            for note in notes:
                print(f"note: {escaped(note)}", file=sys.stderr)
        write_note(entry, now=time.time(), followed_by=None, complete=state in FINAL_STATES)
    checkpoints = sorted(str(path.parent) for path in entry.mirror.checkpoints.glob("*/step_*/manifest.json"))
    if as_json:
        found = {"state": state, "local_dir": entry.local_dir, "checkpoints": checkpoints, "notes": notes}
        print_json({"run_id": entry.run_id, **found})
    else:
        show(f"{entry.run_id} ({state}) is in {entry.local_dir}, with {len(checkpoints)} checkpoints")
    return 0


def logs(run_id: str, *, remote: str | None, window: str, follow_on: bool, as_json: bool) -> int:
    """`deploy logs RUN`: what a tmux window showed, from its beginning; with -f on to the run's end."""
    if as_json and follow_on:
        raise DeployError("--json prints one document, and -f has no end.", fix="leave out one of the two")
    file = f"logs/{window}.log"
    with open_run(run_id, remote, needs_files=True) as run:
        entry = run.entry
        mirror, link = Mirror(entry.mirror), Link(entry, run.python, run.transport)
        write_log = _LogWriter()

        def on_file(changed: str) -> None:
            if changed == file and not as_json:
                write_log(mirror.new_text(file))

        on_file(file)
        if follow_on:
            follow(link, mirror, on_file, _say_on_stderr, Patience())
        else:
            for message in tail(link, mirror, follow=False):
                if changed := apply(mirror, message):
                    on_file(changed)
        for note in left_out_notes(mirror):
            _say_on_stderr("note", note)
        logged = {path.stem for path in entry.mirror.path.glob("logs/*.log")}
        named = {row["window"] for row in mirror.rows("events.jsonl") if isinstance(row.get("window"), str)}
        windows = sorted(logged | named)
        if window in windows and window not in logged:
            _say_on_stderr("note", f"{window} has printed nothing so far")
        if window not in windows:
            raise DeployError(
                f"{entry.run_id} has no window {window!r}.",
                found=f"windows: {', '.join(windows) or 'none yet'}",
                started=True,
            )
    if as_json:
        text = read_plain(entry.mirror.log(window)).decode(errors="replace") if window in logged else ""
        print_json({"run_id": entry.run_id, "window": window, "windows": windows, "text": text})
    return 0


def _say_on_stderr(phase: str, text: str) -> None:
    print(f"{phase}: {escaped(text)}", file=sys.stderr, flush=True)


class _LogWriter:
    """Writes a log's own bytes into a pipe or a file; on a terminal as text that cannot steer it.

    The bytes come in pieces, and a piece may end in the middle of a character.
    """

    def __init__(self) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def __call__(self, data: bytes) -> None:
        if sys.stdout.isatty():
            sys.stdout.write(escaped(self._decoder.decode(data)))
        else:
            sys.stdout.buffer.write(data)
        sys.stdout.flush()


def forget(run_id: str, *, as_json: bool) -> int:
    """`deploy forget RUN`: drop this machine's record of it. Its host and the results here stay as they are."""
    with standing():
        entry = known(run_id)
        seen = last_seen(entry)
        registry.forget(entry)
        if as_json:
            print_json({"run_id": entry.run_id, "local_dir": entry.local_dir, "run_path": entry.run_path})
        else:
            show(forgotten_text(entry, seen["state"]))
    return 0


# --- what a deploy starts from --------------------------------------------------------------------------------------


def mirror_dir(config: Config, root: Path, run_id: str) -> Path:
    """<save_dir>/<experiment_name>/<run_id>; a relative save_dir starts at the repository's root."""
    save_dir = Path(config.output.save_dir).expanduser()
    return root / save_dir / config.output.experiment_name / run_id


def _local_problems(plan: Plan) -> list[Problem]:
    entry = registry.find(plan.run_id)
    if entry is None and not os.path.lexists(plan.local_dir):
        return []
    fix = f"choose another --run-id, or leave it out; `deploy attach {plan.run_id}` goes on with that run"
    if entry is None:
        fix = "choose another --run-id, or leave it out; or move that directory away"
    return [Problem(f"the run id {plan.run_id!r} is in use here.", found=plan.local_dir, fix=fix)]


def python_of(facts: HostFacts) -> str:
    """The host's interpreter; a plan without problems has one."""
    assert facts.python is not None
    return facts.python


# --- output ---------------------------------------------------------------------------------------------------------


def _result_json(
    entry: Entry, result: Result, code: int, pull_error: DeployError | None, notes: list[str]
) -> dict[str, Any]:
    return {
        "type": "result",
        "run_id": entry.run_id,
        "state": result.state,
        "exit_code": code,
        "message": failure_message(entry, result) or None,
        "local_dir": entry.local_dir,
        "evaluations": list(result.view.evals),
        "error": result.view.error,
        "warnings": list(result.view.warnings),
        "notes": notes,
        "pull_error": str(pull_error) if pull_error else None,
    }


def fail(error: DeployError, *, as_json: bool, launching: bool) -> int:
    """Show an error where its reader looks; its exit code."""
    if as_json:
        print_json(error.to_json())
    text = error.text(launching=launching)
    if isinstance(error, Interrupted):
        text = text.removeprefix("error: ")
    print(text, file=sys.stderr)
    return error.exit_code
