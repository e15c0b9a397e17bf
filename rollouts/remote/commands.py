"""The verbs of `deploy`: each gathers, decides, does, and prints. deploy.py only parses.

Every verb returns the process's exit code and raises DeployError for what it cannot do.
"""

import contextlib
import dataclasses
import json
import os
import secrets
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from base_config import Config, ConfigError, load_config
from rollouts.remote import registry
from rollouts.remote.display import make_reporter, print_json
from rollouts.remote.errors import DeployError, Problem, TransportError
from rollouts.remote.execute import execute
from rollouts.remote.facts import HostFacts, gather_facts
from rollouts.remote.host_probe import run_row
from rollouts.remote.mirror import Mirror
from rollouts.remote.plan import Plan, asked_paths, asked_ports, make_plan
from rollouts.remote.registry import Entry
from rollouts.remote.repository import find_repository, read_code
from rollouts.remote.sending import sent_program
from rollouts.remote.texts import facts_text, how_to_go_on, plan_text, result_text, run_text, runs_text
from rollouts.remote.transport import LOCAL_TARGET, Transport, open_transport
from rollouts.remote.watch import Link, Patience, Reporter, Result, final_pull, follow, pull, tail, watch
from rollouts.run_dir import FINAL_STATES, RunDir, read_status, write_text_atomic

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
) -> int:
    """`deploy CONFIG`: plan, send, launch, watch; the job's exit code."""
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
        )
        if plan_only:
            print_json(plan.to_json()) if as_json else print(plan_text(plan))
        if problems := [*plan.problems, *_local_problems(plan)]:
            raise DeployError.of(problems)
        if plan_only:
            return 0
        for warning in plan.warnings:
            _warn(warning, as_json=as_json)
        entry = registry.register(plan, config, root, code.record(), now=time.time())
        return _run(entry, config, facts, transport, as_json=as_json, detach=detach)


def _warn(warning: str, *, as_json: bool) -> None:
    if as_json:
        print_json({"type": "progress", "phase": "warning", "message": warning})
    else:
        print(f"warning: {warning}", flush=True)


def _run(entry: Entry, config: Config, facts: HostFacts, transport: Transport, *, as_json: bool, detach: bool) -> int:
    """From a registered run to its end, or to where the user detaches."""
    with _reporting(entry, as_json=as_json) as reporter:
        reporter.say("run", f"{entry.run_id} on {entry.target}")
        try:
            execute(entry, config, transport, facts.path, reporter.say)
        except TransportError as error:
            raise DeployError(
                str(error), found=error.problems[0].found, fix=f"deploy attach {entry.run_id} goes on", started=True
            ) from None
        if not detach:
            return _watch_to_end(Link(entry, _python(facts), transport), reporter, as_json=as_json)
        reporter.close()
        if as_json:
            print_json({"type": "result", "run_id": entry.run_id, "state": "launched", "exit_code": None})
        else:
            print(how_to_go_on(entry))
        return 0


def attach(run_id: str, *, remote: str | None, as_json: bool, accept_new_host_key: bool) -> int:
    """`deploy attach RUN`: go on where the last deploy left off, whatever it had come to."""
    with _opened(run_id, remote, accept_new_host_key=accept_new_host_key) as (entry, facts, transport):
        row = facts.run(run_id)
        if row is None or (not row["launched"] and row["state"] not in FINAL_STATES):
            return _run(entry, _planned(entry), facts, transport, as_json=as_json, detach=False)
        with _reporting(entry, as_json=as_json) as reporter:
            return _watch_to_end(Link(entry, _python(facts), transport), reporter, as_json=as_json)


def _planned(entry: Entry) -> Config:
    """The config of a run that is yet to be launched, once its plan can be read too. Raises DeployError."""
    try:
        config, _ = Config.load(entry.mirror.config), entry.launch
    except (ConfigError, TypeError, KeyError) as error:
        raise DeployError(
            f"{entry.run_id} was never launched, and another version of this program planned it.",
            found=str(error),
            fix="start it anew: deploy CONFIG",
        ) from None
    return config


@contextlib.contextmanager
def _reporting(entry: Entry, *, as_json: bool) -> Iterator[Reporter]:
    """A reporter, closed at the end; Ctrl-C in between says how to go on, and exits."""
    reporter = make_reporter(as_json=as_json)
    try:
        yield reporter
    except KeyboardInterrupt:
        reporter.close()
        if as_json:
            print_json({"type": "result", "run_id": entry.run_id, "state": "detached", "exit_code": None})
        else:
            print(f"\ndetached. {how_to_go_on(entry)}", flush=True)
        raise SystemExit(DETACHED) from None
    finally:
        reporter.close()


def _watch_to_end(link: Link, reporter: Reporter, *, as_json: bool) -> int:
    result = watch(link, reporter, Patience())
    reporter.close()
    pull_error: DeployError | None = None
    try:
        final_pull(link)
    except DeployError as error:  # the job's end is told first, and the run's files are still on the host
        pull_error = error
    code = result.exit_code if result.exit_code is not None else 1
    if pull_error is not None and code == 0:
        code = 1
    if as_json:
        print_json(_result_json(link.entry, result, code, pull_error))
    else:
        print(result_text(link.entry, result, code, pull_error))
    return code


def stop(run_id: str, *, remote: str | None, as_json: bool) -> int:
    """`deploy stop RUN`: end its processes on the host. 0 once it is over, however it ended."""
    with _opened(run_id, remote) as (entry, facts, transport):
        argv, program = sent_program(_python(facts), "rollouts.worker.stop", entry.run_path)
        grace_s = entry.stop_grace_s
        grace_s = STOP_MARGIN_S if grace_s is None else grace_s
        done = transport.run(argv, stdin=program, timeout_s=2 * grace_s + STOP_MARGIN_S)
        if done.returncode != 0 and facts.run(run_id) is None:
            raise _never_launched(run_id, entry.target)
        if done.returncode != 0:
            raise DeployError(f"{run_id} could not be stopped.", found=done.err[-2000:], started=True)
        answer = json.loads(done.out.splitlines()[-1])
    if as_json:
        print_json({"run_id": run_id, **answer})
    else:
        print(f"{run_id}: {answer['state']}, exit code {answer['exit_code']}\nresults   deploy pull {run_id}")
    return 0


def pull_run(run_id: str, *, remote: str | None, as_json: bool) -> int:
    """`deploy pull RUN`: all results that there are now, verified."""
    with _opened(run_id, remote, launched=True) as (entry, facts, transport):
        state = pull(Link(entry, _python(facts), transport))
    checkpoints = sorted(str(path.parent) for path in entry.mirror.checkpoints.glob("*/step_*/manifest.json"))
    if as_json:
        print_json({"run_id": run_id, "state": state, "local_dir": entry.local_dir, "checkpoints": checkpoints})
    else:
        print(f"{run_id} ({state}) is in {entry.local_dir}, with {len(checkpoints)} checkpoints")
    return 0


def logs(run_id: str, *, remote: str | None, window: str, follow_on: bool, as_json: bool) -> int:
    """`deploy logs RUN`: what a tmux window showed, from its beginning; with -f on to the run's end."""
    if as_json and follow_on:
        raise DeployError("--json prints one document, and -f has no end.", fix="leave out one of the two")
    file = f"logs/{window}.log"
    with _opened(run_id, remote, launched=True) as (entry, facts, transport):
        mirror, link = Mirror(entry.mirror), Link(entry, _python(facts), transport)

        def on_file(changed: str) -> None:
            if changed == file and not as_json:
                sys.stdout.buffer.write(mirror.new_text(file))
                sys.stdout.buffer.flush()

        on_file(file)
        if follow_on:
            follow(link, mirror, on_file, lambda phase, text: print(f"{phase}: {text}", file=sys.stderr), Patience())
        else:
            for message in tail(link, mirror, follow=False):
                if changed := mirror.apply(message):
                    on_file(changed)
    windows = sorted(path.stem for path in entry.mirror.path.glob("logs/*.log"))
    if window not in windows:
        raise DeployError(
            f"{run_id} has no window {window!r}.", found=f"windows: {', '.join(windows) or 'none yet'}", started=True
        )
    if as_json:
        text = entry.mirror.log(window).read_text(errors="replace")
        print_json({"run_id": run_id, "window": window, "windows": windows, "text": text})
    return 0


def status(run_id: str, *, remote: str | None, as_json: bool) -> int:
    """`deploy status RUN`: one look at the host."""
    with _opened(run_id, remote) as (entry, facts, _):
        row = facts.run(run_id)
    message = row["message"] if row else f"not launched yet: `deploy attach {run_id}` goes on with it"
    shown = _list_row(entry.target, entry.experiment_name, run_id, row)
    shown |= {"message": message, "run_path": entry.run_path, "local_dir": entry.local_dir}
    print_json(shown) if as_json else print(run_text(shown))
    return 0


def list_runs(*, remote: str | None, as_json: bool) -> int:
    """`deploy ls`: the runs started here, as last seen; with --remote all runs on that host, as they are."""
    if remote is not None:
        with contextlib.closing(open_transport(remote)) as transport:
            found = gather_facts(transport).runs
        rows = [_list_row(remote, row["experiment_name"], row["run_id"], row) for row in found]
    else:
        rows = [_last_seen(entry) for entry in registry.entries()]
    print_json(rows) if as_json else print(runs_text(rows))
    return 0


def check_host(remote: str | None, *, as_json: bool, accept_new_host_key: bool) -> int:
    """`deploy --remote T`: what the host has, what it lacks, and its runs. 2 when it cannot run a job."""
    with contextlib.closing(open_transport(remote, accept_new_host_key=accept_new_host_key)) as transport:
        facts = gather_facts(transport, check_way=True)
    target = remote or LOCAL_TARGET
    lacking = [tool for tool in ("tmux", "rsync") if tool not in facts.tools]
    lacking += ["python3 >= 3.11"] if facts.python is None else []
    if as_json:
        print_json({"target": target, "lacking": lacking, "facts": dataclasses.asdict(facts)})
    else:
        rows = [_list_row(target, row["experiment_name"], row["run_id"], row) for row in facts.runs]
        print(f"{facts_text(target, facts, lacking)}\n\n{runs_text(rows)}")
        for problem in facts.way_problems:
            print(f"error: {problem.text()}", file=sys.stderr)
    return 2 if lacking or facts.way_problems else 0


# --- finding a run --------------------------------------------------------------------------------------------------


def read_config(path: str) -> Config:
    """The config, checked; every problem at once."""
    try:
        config = load_config(path)
    except ConfigError as error:
        raise DeployError(str(error)) from None
    problems = config.problems()
    if problems:
        count = f"{len(problems)} problem{'s' if len(problems) > 1 else ''}"
        raise DeployError(f"{path}: {count} in the config.", found="\n".join(problems))
    return config


def mirror_dir(config: Config, root: Path, run_id: str) -> Path:
    """<save_dir>/<experiment_name>/<run_id>; a relative save_dir starts at the repository's root."""
    save_dir = Path(config.output.save_dir).expanduser()
    return root / save_dir / config.output.experiment_name / run_id


def _local_problems(plan: Plan) -> list[Problem]:
    taken = registry.find(plan.run_id) is not None or Path(plan.local_dir).exists()
    if not taken:
        return []
    return [
        Problem(
            f"the run id {plan.run_id!r} is in use here.",
            found=plan.local_dir,
            fix=f"choose another --run-id, or leave it out; `deploy attach {plan.run_id}` goes on with that run",
        )
    ]


@contextlib.contextmanager
def _opened(
    run_id: str, remote: str | None, *, launched: bool = False, accept_new_host_key: bool = False
) -> Iterator[tuple[Entry, HostFacts, Transport]]:
    """A run by name, and its host: from the registry, or, started elsewhere, from the host that --remote names.

    Raises DeployError for a run that is nowhere, or not `launched` where it has to be.
    """
    entry = registry.find(run_id)
    target = remote or (entry.target if entry else LOCAL_TARGET)
    with contextlib.closing(open_transport(target, accept_new_host_key=accept_new_host_key)) as transport:
        facts = gather_facts(transport)
        row = facts.run(run_id)
        if entry is None or (entry.target != target and row is None):
            entry = _adopt(run_id, target, facts, transport)  # started elsewhere
        entry = dataclasses.replace(entry, target=target)  # one host may have several names
        if launched and row is None:
            raise _never_launched(run_id, target)
        yield entry, facts, transport


def _never_launched(run_id: str, target: str) -> DeployError:
    return DeployError(f"{run_id} was never launched on {target}.", fix=f"deploy attach {run_id} launches it")


def _adopt(run_id: str, target: str, facts: HostFacts, transport: Transport) -> Entry:
    """Register a run that another machine started."""
    row = facts.run(run_id)
    if row is None:
        known = [entry.run_id for entry in registry.entries()] + [row["run_id"] for row in facts.runs]
        raise DeployError(
            f"there is no run {run_id!r} on {target}.",
            found=f"runs: {', '.join(sorted(set(known))[-8:]) or 'none'}",
            fix="deploy ls shows the runs started here, deploy ls --remote T those of a host",
        )
    run_path = f"{facts.home}/runs/{run_id}"
    texts = {}
    for name in ("config.json", "plan.json"):
        done = transport.run(["cat", f"{run_path}/{name}"], timeout_s=30)
        if done.returncode != 0:
            raise DeployError(f"{target}: {run_path}/{name} cannot be read.", found=done.err, started=True)
        texts[name] = done.out
    config = Config.from_json(json.loads(texts["config.json"]))
    try:
        root = find_repository(Path.cwd())
    except DeployError:
        root = Path.cwd()
    local_dir = mirror_dir(config, root, run_id)
    write_text_atomic(local_dir / ".gitignore", "*\n")
    for name, text in texts.items():
        write_text_atomic(local_dir / name, text)
    entry = Entry(
        run_id=run_id,
        experiment_name=row["experiment_name"],
        target=target,
        home=facts.home,
        run_path=run_path,
        local_dir=str(local_dir),
        repository=str(root),
        created_at=row["started_at"],
    )
    registry.save(entry)
    return entry


def _needs_launch(entry: Entry, facts: HostFacts) -> None:
    if facts.run(entry.run_id) is None:
        raise DeployError(
            f"{entry.run_id} was never launched on {entry.target}.", fix=f"deploy attach {entry.run_id} launches it"
        )


def _python(facts: HostFacts) -> str:
    if facts.python is None:
        raise DeployError(
            "the host has no Python 3.11 or newer any more.", found=", ".join(facts.pythons_seen), started=True
        )
    return facts.python


# --- JSON -----------------------------------------------------------------------------------------------------------


def _result_json(entry: Entry, result: Result, code: int, pull_error: DeployError | None) -> dict[str, Any]:
    return {
        "type": "result",
        "run_id": entry.run_id,
        "state": result.state,
        "exit_code": code,
        "local_dir": entry.local_dir,
        "evaluations": list(result.view.evals),
        "message": result.view.error["message"] if result.view.error else None,
        "error": result.view.error,
        "pull_error": str(pull_error) if pull_error else None,
    }


def _list_row(target: str, experiment_name: str, run_id: str, row: dict[str, Any] | None) -> dict[str, Any]:
    names = ("state", "stage", "step", "started_at", "exit_code", "message")
    values = {name: row[name] if row else None for name in names}
    values["state"] = values["state"] or "unknown"
    return {"run_id": run_id, "experiment_name": experiment_name, "target": target, **values}


def _last_seen(entry: Entry) -> dict[str, Any]:
    """A run from what lies on this machine."""
    if entry.target == LOCAL_TARGET:
        row = run_row(RunDir(Path(entry.run_path)))
    else:
        row = run_row(entry.mirror)
        seen = read_status(entry.mirror)
        if row and seen:
            row["state"] = seen.state  # a mirror has no lock that tells the living from the dead
    return _list_row(entry.target, entry.experiment_name, entry.run_id, row)


def fail(error: DeployError, *, as_json: bool) -> int:
    """Show an error where its reader looks; its exit code."""
    if as_json:
        print_json(error.to_json())
    print(error.text(), file=sys.stderr)
    return error.exit_code
