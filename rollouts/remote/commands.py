"""The verbs of `deploy`: each gathers, decides, does, and prints. deploy.py only parses.

Every verb returns the process's exit code and raises DeployError for what it cannot do.
"""

import os
import secrets
import sys
import time
from pathlib import Path
from typing import Any

from base_config import Config, ConfigError, load_config
from rollouts.remote import registry
from rollouts.remote.display import LogReporter, columns, evaluation_text, make_reporter, print_json
from rollouts.remote.errors import DeployError, Problem
from rollouts.remote.execute import execute, read_secrets
from rollouts.remote.facts import HostFacts, gather_facts
from rollouts.remote.mirror import Mirror
from rollouts.remote.plan import Plan, asked_paths, asked_ports, make_plan
from rollouts.remote.registry import Entry
from rollouts.remote.repository import find_repository, read_code
from rollouts.remote.transport import LOCAL_TARGET, Transport, open_transport
from rollouts.remote.view import View, fold
from rollouts.remote.watch import LINE_FILES, Patience, Reporter, Result, final_pull, follow, pull, watch
from rollouts.run_dir import FINAL_STATES, RunDir, tail_lines, write_text_atomic

DETACHED = 130  # as a shell says of Ctrl-C
STOP_MARGIN_S = 60.0
LOG_TAIL_LINES = 50


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
    target = remote or LOCAL_TARGET
    run_id = run_id or f"{config.output.experiment_name}-{time.strftime('%Y%m%d-%H%M%S')}-{secrets.token_hex(2)}"
    transport = open_transport(remote, accept_new_host_key=accept_new_host_key)
    try:
        facts = gather_facts(transport, ports=asked_ports(config), paths=asked_paths(config), run_id=run_id)
        code = read_code(root, config)
        plan = make_plan(
            config,
            facts,
            code,
            target=target,
            run_id=run_id,
            local_dir=str(mirror_dir(config, root, run_id)),
            secrets_set=[name for name in config.host.secrets if os.environ.get(name)],
        )
        problems = [*plan.problems, *_local_problems(plan)]
        if plan_only:
            print_json(plan.to_json()) if as_json else print(plan_text(plan))
        if problems:
            raise DeployError.of(problems)
        if plan_only:
            return 0
        entry = registry.register(plan, config, root, code.record(), now=time.time())
        return _run(entry, config, facts, transport, as_json=as_json, detach=detach)
    finally:
        transport.close()


def _run(entry: Entry, config: Config, facts: HostFacts, transport: Transport, *, as_json: bool, detach: bool) -> int:
    """From a registered run to its end, or to where the user detaches."""
    reporter = make_reporter(as_json=as_json)
    try:
        reporter.say("run", f"{entry.run_id} on {entry.target}")
        execute(entry, config, transport, facts.path, reporter.say)
        if detach:
            reporter.close()
            if as_json:
                print_json({"type": "result", "run_id": entry.run_id, "state": "launched", "exit_code": None})
            else:
                print(how_to_go_on(entry))
            return 0
        return _watch_to_end(entry, facts, transport, reporter, as_json=as_json)
    except KeyboardInterrupt:
        return _detached(entry, reporter, as_json=as_json)
    finally:
        reporter.close()


def attach(run_id: str, *, remote: str | None, as_json: bool, accept_new_host_key: bool) -> int:
    """`deploy attach RUN`: go on where the last deploy left off, whatever it had come to."""
    entry, facts, transport = _open(run_id, remote, accept_new_host_key=accept_new_host_key)
    row = facts.run(run_id)
    try:
        if row is None or (not row["launched"] and row["state"] not in FINAL_STATES):
            config = Config.load(entry.mirror.config)
            read_secrets(config)
            return _run(entry, config, facts, transport, as_json=as_json, detach=False)
        reporter = make_reporter(as_json=as_json)
        try:
            return _watch_to_end(entry, facts, transport, reporter, as_json=as_json)
        except KeyboardInterrupt:
            return _detached(entry, reporter, as_json=as_json)
        finally:
            reporter.close()
    finally:
        transport.close()


def _watch_to_end(entry: Entry, facts: HostFacts, transport: Transport, reporter: Reporter, *, as_json: bool) -> int:
    result = watch(entry, _python(facts), transport, reporter, Patience())
    reporter.close()
    pulled: DeployError | None = None
    try:
        final_pull(entry, transport)
    except DeployError as error:  # the job's end is told first, and the run's files are still on the host
        pulled = error
    code = result.exit_code if result.exit_code is not None else 1
    if pulled is not None and code == 0:
        code = 1
    if as_json:
        print_json(_result_json(entry, result, code, pulled))
    else:
        print(_result_text(entry, result, code, pulled))
    return code


def stop(run_id: str, *, remote: str | None, as_json: bool) -> int:
    """`deploy stop RUN`: end its processes on the host. 0 once it is over, however it ended."""
    entry, facts, transport = _open(run_id, remote)
    try:
        _needs_launch(entry, facts)
        argv = [_python(facts), "-m", "rollouts.worker.stop", entry.run_path]
        grace_s = entry.launch.stop_grace_s if entry.launch else 60.0
        done = transport.run(argv, cwd=f"{entry.run_path}/code/tree", timeout_s=2 * grace_s + STOP_MARGIN_S)
        if done.returncode != 0:
            raise DeployError(f"{run_id} could not be stopped.", found=done.err[-2000:], started=True)
        import json

        answer = json.loads(done.out.splitlines()[-1])
    finally:
        transport.close()
    if as_json:
        print_json({"run_id": run_id, **answer})
    else:
        print(f"{run_id}: {answer['state']}, exit code {answer['exit_code']}\nresults   deploy pull {run_id}")
    return 0


def pull_run(run_id: str, *, remote: str | None, as_json: bool) -> int:
    """`deploy pull RUN`: all results that there are now, verified."""
    entry, facts, transport = _open(run_id, remote)
    try:
        _needs_launch(entry, facts)
        state = pull(entry, _python(facts), transport)
    finally:
        transport.close()
    checkpoints = sorted(str(p.parent) for p in entry.mirror.checkpoints.glob("*/step_*/manifest.json"))
    if as_json:
        print_json({"run_id": run_id, "state": state, "local_dir": entry.local_dir, "checkpoints": checkpoints})
    else:
        print(f"{run_id} ({state}) is in {entry.local_dir}, with {len(checkpoints)} checkpoints")
    return 0


def logs(run_id: str, *, remote: str | None, window: str, follow_on: bool, as_json: bool) -> int:
    """`deploy logs RUN`: what a tmux window showed, from its beginning; with -f on to the run's end."""
    entry, facts, transport = _open(run_id, remote)
    mirror, reporter = Mirror(entry.mirror), LogReporter(window)
    file = f"logs/{window}.log"
    try:
        _needs_launch(entry, facts)
        if as_json and follow_on:
            raise DeployError("--json prints one document, and -f has no end.", fix="leave out one of the two")

        def on_file(changed: str) -> None:
            if changed == file and not as_json:
                reporter.log(window, mirror.new_text(file))

        on_file(file)
        if follow_on:
            follow(entry, _python(facts), transport, mirror, on_file, reporter.say, Patience())
        else:
            from rollouts.remote.watch import tail

            for message in tail(entry, _python(facts), transport, mirror, follow=False):
                if changed := mirror.apply(message):
                    on_file(changed)
    except KeyboardInterrupt:
        return DETACHED
    finally:
        transport.close()
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
    entry, facts, transport = _open(run_id, remote)
    transport.close()
    row = facts.run(run_id)
    shown = _list_row(entry.target, entry.experiment_name, run_id, row)
    shown |= {"message": (row or {}).get("message") or "not launched yet: deploy attach goes on with it"}
    shown |= {"run_path": entry.run_path, "local_dir": entry.local_dir}
    if as_json:
        print_json(shown)
    else:
        width = max(map(len, shown))
        print("\n".join(f"{name:<{width}}  {_cell(name, value)}" for name, value in shown.items()))
    return 0


def list_runs(*, remote: str | None, as_json: bool) -> int:
    """`deploy ls`: the runs started here, as last seen; with --remote all runs on that host, as they are."""
    if remote is not None:
        transport = open_transport(remote)
        try:
            facts = gather_facts(transport)
        finally:
            transport.close()
        rows = [_list_row(remote, row["experiment_name"], row["run_id"], row) for row in facts.runs]
    else:
        from rollouts.remote.host_probe import run_row

        rows = []
        for entry in registry.entries():
            here = RunDir(Path(entry.run_path)) if entry.target == LOCAL_TARGET else entry.mirror
            row = run_row(here)
            if row is not None and entry.target != LOCAL_TARGET:
                row["state"] = _as_last_seen(entry, row)
            rows.append(_list_row(entry.target, entry.experiment_name, entry.run_id, row))
    print_json(rows) if as_json else print(_rows_text(rows))
    return 0


def check_host(remote: str | None, *, as_json: bool, accept_new_host_key: bool) -> int:
    """`deploy --remote T`: what the host has, what it lacks, and its runs. 2 when it cannot run a job."""
    transport = open_transport(remote, accept_new_host_key=accept_new_host_key)
    try:
        facts = gather_facts(transport)
    finally:
        transport.close()
    target = remote or LOCAL_TARGET
    lacking = [tool for tool in ("tmux", "rsync") if tool not in facts.tools]
    lacking += ["python3 >= 3.11"] if facts.python is None else []
    rows = [_list_row(target, row["experiment_name"], row["run_id"], row) for row in facts.runs]
    if as_json:
        import dataclasses

        print_json({"target": target, "lacking": lacking, "facts": dataclasses.asdict(facts)})
    else:
        print(_facts_text(target, facts, lacking))
        print("\n" + _rows_text(rows))
    return 2 if lacking else 0


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


def _open(run_id: str, remote: str | None, *, accept_new_host_key: bool = False) -> tuple[Entry, HostFacts, Transport]:
    """A run by name: from the registry, or, started elsewhere, from the host that --remote names."""
    entry = registry.find(run_id)
    if entry is None and remote is None:
        entry = None
    target = remote or (entry.target if entry else LOCAL_TARGET)
    transport = open_transport(target, accept_new_host_key=accept_new_host_key)
    try:
        facts = gather_facts(transport, run_id=run_id)
        if entry is None or (remote is not None and facts.run(run_id) and entry.target != remote):
            entry = _adopt(run_id, target, facts, transport)
    except BaseException:
        transport.close()
        raise
    return entry, facts, transport


def _adopt(run_id: str, target: str, facts: HostFacts, transport: Transport) -> Entry:
    """Register a run that another machine started."""
    row = facts.run(run_id)
    if row is None:
        known = [entry.run_id for entry in registry.entries()] + [row["run_id"] for row in facts.runs]
        raise DeployError(
            f"no run {run_id!r} is known here, nor on {target}.",
            found=f"runs: {', '.join(sorted(set(known))[-8:]) or 'none'}",
            fix="deploy ls, or deploy ls --remote T for the runs of a host",
        )
    run_path = f"{facts.home}/runs/{run_id}"
    texts = {}
    for name in ("config.json", "plan.json"):
        done = transport.run(["cat", f"{run_path}/{name}"], timeout_s=30)
        if done.returncode != 0:
            raise DeployError(f"{target}: {run_path}/{name} cannot be read.", found=done.err, started=True)
        texts[name] = done.out
    import json

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


# --- text -----------------------------------------------------------------------------------------------------------


def plan_text(plan: Plan) -> str:
    lines = [f"plan for {plan.run_id} on {plan.target} (nothing is touched)"]
    for number, step in enumerate(plan.steps, 1):
        lines += [f"{number:>3}. {step.what}", f"     because: {step.why}"]
    return "\n".join([*lines, *(f"note: {note}" for note in plan.notes)])


def how_to_go_on(entry: Entry) -> str:
    return "\n".join(
        [
            f"{entry.run_id} goes on, on {entry.target}.",
            f"  attach  deploy attach {entry.run_id}",
            f"  stop    deploy stop {entry.run_id}",
            f"  pull    deploy pull {entry.run_id}",
        ]
    )


def _detached(entry: Entry, reporter: Reporter, *, as_json: bool) -> int:
    reporter.close()
    if as_json:
        print_json({"type": "result", "run_id": entry.run_id, "state": "detached", "exit_code": None})
    else:
        print("\ndetached. " + how_to_go_on(entry))
    return DETACHED


def _result_text(entry: Entry, result: Result, code: int, pulled: DeployError | None) -> str:
    parts = []
    if result.state != "done":
        parts.append(_failure_text(entry, result))
    if table := evaluation_text(result.view):
        parts.append(table)
    if pulled is not None:
        parts.append(pulled.text() + f"\n  again   deploy pull {entry.run_id}")
    parts.append(f"{entry.run_id}: {result.state}, exit code {code}\nresults   {entry.local_dir}")
    return "\n\n".join(parts)


def _failure_text(entry: Entry, result: Result) -> str:
    error = result.view.error
    if error is not None:
        window, tail = error.get("window"), error.get("log_tail") or []
        lines = tail.splitlines() if isinstance(tail, str) else list(tail)
        heading = f"error: {error['message']}"
    elif result.state == "died":
        window, lines = "supervisor", tail_lines(entry.mirror.log("supervisor"), LOG_TAIL_LINES)
        heading = "error: the run died: its supervisor was killed, or the host went down."
    else:
        return ""
    quoted = "\n".join(f"  | {line}" for line in lines[-LOG_TAIL_LINES:])
    return f"{heading}\nlast lines of {window}:\n{quoted}" if lines else heading


def _result_json(entry: Entry, result: Result, code: int, pulled: DeployError | None) -> dict[str, Any]:
    return {
        "type": "result",
        "run_id": entry.run_id,
        "state": result.state,
        "exit_code": code,
        "local_dir": entry.local_dir,
        "evaluations": list(result.view.evals),
        "error": result.view.error,
        "pull_error": str(pulled) if pulled else None,
    }


def _list_row(target: str, experiment_name: str, run_id: str, row: dict[str, Any] | None) -> dict[str, Any]:
    names = ("state", "stage", "step", "started_at", "exit_code")
    values = {name: row[name] if row else None for name in names}
    values["state"] = values["state"] or "unknown"
    return {"run_id": run_id, "experiment_name": experiment_name, "target": target, **values}


def _as_last_seen(entry: Entry, row: dict[str, Any]) -> str:
    """A mirror has no lock to tell the living from the dead: what its status said, then."""
    from rollouts.run_dir import read_status

    seen = read_status(entry.mirror)
    return seen.state if seen else str(row["state"])


def _rows_text(rows: list[dict[str, Any]]) -> str:
    if not rows:
        return "no runs"
    header = ["run_id", "target", "state", "stage", "step", "started_at", "exit_code"]
    return columns([header, *([_cell(name, row[name]) for name in header] for row in rows)])


def _cell(name: str, value: Any) -> str:
    if value is None:
        return "-"
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(value)) if name == "started_at" else str(value)


def _facts_text(target: str, facts: HostFacts, lacking: list[str]) -> str:
    gpus = [
        f"{gpu.index}: {gpu.name}, {gpu.memory_free_mib / 1024:.0f} of {gpu.memory_total_mib / 1024:.0f} GiB free"
        for gpu in facts.gpus
    ]
    rows = [
        ["host", f"{facts.user}@{facts.host}, {facts.system}"],
        ["home", facts.home],
        ["python", f"{facts.python} {facts.python_version}" if facts.python else "none >= 3.11"],
        *([tool, facts.versions.get(tool) or facts.tools.get(tool) or "missing"] for tool in ("tmux", "rsync", "uv")),
        ["gpus", "; ".join(gpus) or facts.gpu_problem or "none"],
        *([["driver", facts.driver]] if facts.driver else []),
        ["disk", f"{facts.disk_free_bytes / 2**30:.0f} GiB free"],
        ["ready", f"no: {', '.join(lacking)} missing" if lacking else "yes"],
    ]
    return f"{target}\n" + "\n".join(f"  {name:<7} {value}" for name, value in rows)


def fold_mirror(run: RunDir) -> View:
    """The view of what the mirror holds."""
    mirror, view = Mirror(run), View()
    for file in LINE_FILES:
        for row in mirror.rows(file):
            view = fold(view, file, row)
    return view


def fail(error: DeployError, *, as_json: bool) -> int:
    """Show an error where its reader looks; its exit code."""
    if as_json:
        print_json(error.to_json())
    print(error.text(), file=sys.stderr)
    return error.exit_code
