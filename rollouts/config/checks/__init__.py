"""Every reason a config cannot run. Pure: nothing is read, nothing is asked."""

import dataclasses
import typing
from collections.abc import Mapping
from typing import Any

from rollouts.config.checks.across import cross_checks
from rollouts.config.checks.data import data_checks, eval_checks
from rollouts.config.checks.engine import engine_checks
from rollouts.config.checks.model import model_checks
from rollouts.config.checks.needs import Checks
from rollouts.config.checks.provision import provision_checks
from rollouts.config.checks.run import host_checks, limits_checks, output_checks, target_checks
from rollouts.config.checks.stage_checks import rl_checks, sft_checks
from rollouts.config.field_types import type_problems
from rollouts.config.schema import Sections

_GROUP_CHECKS: Mapping[str, typing.Callable[[Any], Checks]] = {
    "target": target_checks,
    "host": host_checks,
    "model": model_checks,
    "data": data_checks,
    "sft": sft_checks,
    "rl": rl_checks,
    "eval": eval_checks,
    "engine": engine_checks,
    "limits": limits_checks,
    "output": output_checks,
    "provision": provision_checks,
}


def config_problems(config: Sections) -> tuple[str, ...]:
    """Return every reason this config cannot run; empty when it can."""
    bad_paths: set[str] = set()
    messages = []
    for path, message in type_problems(config, Sections, ""):
        bad_paths.add(path.split(".")[0].split("[")[0])
        messages.append(message)
    for group, checks in _GROUP_CHECKS.items():
        value = getattr(config, group)
        if group not in bad_paths and value is not None:
            messages += [message for ok, message in checks(value) if not ok]
    if not bad_paths:
        messages += [message for ok, message in cross_checks(config) if not ok]
        messages += [] if messages else _fewer_hosts_problems(config)
    return tuple(messages)


def fewer_hosts(config: Sections) -> list[int]:
    """Return with how many hosts the job may go on where some die: from target.hosts_min on, those over whose ranks
    its batches divide."""
    counts = range(
        config.target.hosts_min, config.target.hosts if config.limits.restarts_max else 0
    )
    return [count for count in counts if not config_problems(_on_hosts(config, count))]


def _fewer_hosts_problems(config: Sections) -> list[str]:
    """Say that the fewest hosts that are allowed cannot do the job."""
    target, fewest = config.target, config.target.hosts_min
    if not config.limits.restarts_max or fewest == target.hosts or fewest in fewer_hosts(config):
        return []
    why = config_problems(_on_hosts(config, fewest))[0]
    return [f"target.hosts_min={fewest}: needs a number of hosts that can do the job alone: {why}"]


def _on_hosts(config: Sections, count: int) -> Sections:
    target = dataclasses.replace(config.target, hosts=count, hosts_min=count)
    return dataclasses.replace(config, target=target)
