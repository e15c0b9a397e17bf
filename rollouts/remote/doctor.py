"""`deploy doctor`: everything about a host that decides whether a run gets to its end, before a minute is spent."""

import contextlib
import dataclasses
import os
from collections.abc import Sequence
from pathlib import Path

from rollouts.config import Config
from rollouts.remote.commands import look_at_host, new_run_id, plan_run
from rollouts.remote.doctor_text import Findings, doctor_text
from rollouts.remote.errors import DeployError, Problem
from rollouts.remote.host.facts import HostFacts, gather_facts
from rollouts.remote.host.host_health import HostHealth, Question, examine
from rollouts.remote.host.open import open_transport
from rollouts.remote.host.transport import LOCAL_TARGET, Transport
from rollouts.remote.local_faults import as_deploy_errors
from rollouts.remote.plan import Plan
from rollouts.remote.plan.gpu_problems import host_advice, host_stops
from rollouts.remote.plan.health_problems import diagnose
from rollouts.remote.plan.problems import tool_problems
from rollouts.remote.read_config import read_variants
from rollouts.remote.repository import find_repository, read_code
from rollouts.view.answer import Answer
from rollouts.view.screen import terminal_width

TOKEN = "HF_TOKEN"
PLAIN_WIDTH = 80  # of a pipe or a file


def doctor(
    config_path: str | None,
    *,
    remote: str | None,
    accept_new_host_key: bool,
    settings: Sequence[str],
) -> Answer:
    """Examine a host, and with a config whether that one would run there. Exit code 1: something stops a run."""
    target = remote or LOCAL_TARGET
    with as_deploy_errors():
        config = read_variants(config_path, settings)[0].config if config_path else None
        root = find_repository(Path.cwd()) if config else None
        with contextlib.closing(
            open_transport(remote, accept_new_host_key=accept_new_host_key)
        ) as transport:
            try:
                found = _examine(transport, config, root, target)
            except DeployError as error:
                # the host cannot be reached, or asked: that is what was found
                found = Findings(target, None, None, "", error.problems, ())
    text = doctor_text(found, width=terminal_width() or PLAIN_WIDTH)
    return Answer(_document(found), text, exit_code=1 if found.stops else 0)


def _examine(
    transport: Transport, config: Config | None, root: Path | None, target: str
) -> Findings:
    plan: Plan | None = None
    if config is not None and root is not None:
        run_id = new_run_id(config)
        facts = look_at_host(transport, [config], run_id=run_id)
        code = read_code(root, config)
        plan = plan_run(config, code, facts, run_id, target=target, busy_ok=False)
        stops, warnings = [*plan.problems], [Problem(text) for text in plan.warnings]
    else:
        facts = gather_facts(transport, check_way=True)
        stops = [*facts.way_problems, *tool_problems(facts, target), *host_stops(facts, target)]
        warnings = [problem for problem in host_advice(facts, target) if problem not in stops]
    health = (
        examine(transport, facts.python, _question(facts, config, plan)) if facts.python else None
    )
    if health is not None:
        diagnosis = diagnose(facts, health, target, reuses=_reuses(facts, plan))
        stops, warnings = [*stops, *diagnosis.stops], [*warnings, *diagnosis.warnings]
    return Findings(target, facts, health, transport.described(), tuple(stops), tuple(warnings))


def _question(facts: HostFacts, config: Config | None, plan: Plan | None) -> Question:
    named = config is not None and TOKEN in config.host.secrets
    return Question(
        home=facts.home,
        pids=sorted({process.pid for process in facts.gpu_processes if process.pid}),
        models=[model.name for model in plan.launch.models] if plan and plan.launch else [],
        env=config.host.env if config else {},
        token=os.environ.get(TOKEN, "") if named else "",
    )


def _reuses(facts: HostFacts, plan: Plan | None) -> bool:
    """Return whether the environments are there already: those of the plan, or without one any."""
    if plan is None or plan.launch is None:
        return bool(facts.environments)
    return all(
        Path(environment.path).name in facts.environments
        for environment in plan.launch.environments
    )


def _document(found: Findings) -> dict[str, object]:
    def shown(value: HostFacts | HostHealth | None) -> dict[str, object] | None:
        return dataclasses.asdict(value) if value is not None else None

    return {
        "target": found.target,
        "way": found.way,
        "ready": not found.stops,
        "stops": list(map(dataclasses.asdict, found.stops)),
        "warnings": list(map(dataclasses.asdict, found.warnings)),
        "facts": shown(found.facts),
        "health": shown(found.health),
    }
