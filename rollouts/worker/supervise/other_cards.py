"""A plan on other GPUs and ports than those that it was made for. Pure, standard library only."""

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace

from rollouts.run_dir import GPUS_VARIABLE, LaunchPlan, NamedGpu, ProcessSpec, SmokeCheck, StageSpec

VISIBLE = "CUDA_VISIBLE_DEVICES"
LOOPBACK_PORT = re.compile(r"(?<=//127\.0\.0\.1:)\d+")


def placed(plan: LaunchPlan, cards: Mapping[int, NamedGpu], ports: Mapping[int, int]) -> LaunchPlan:
    """Return the plan with each GPU and port replaced; those that are not named stay. It waits for nothing any more."""
    stages = [_stage(stage, cards, ports) for stage in plan.stages]
    smoke = [_smoke(check, cards) for check in plan.smoke]
    return replace(plan, stages=stages, smoke=smoke, queue=None)


def _stage(stage: StageSpec, cards: Mapping[int, NamedGpu], ports: Mapping[int, int]) -> StageSpec:
    engines = [_process(engine, cards, ports) for engine in stage.engines]
    assert stage.trainer is not None, "one host trains and waits for its turn; several do not queue"
    return replace(stage, engines=engines, trainer=_process(stage.trainer, cards, ports))


def _process(
    spec: ProcessSpec, cards: Mapping[int, NamedGpu], ports: Mapping[int, int]
) -> ProcessSpec:
    ready_url = None if spec.ready_url is None else _url(spec.ready_url, ports)
    return replace(
        spec, env=_env(spec.env, cards), argv=_argv(spec.argv, ports), ready_url=ready_url
    )


def _env(env: Mapping[str, str], cards: Mapping[int, NamedGpu]) -> dict[str, str]:
    """Return the environment with the cards' numbers, and their UUIDs where these name them."""
    numbers = env.get(GPUS_VARIABLE, "")
    if not numbers or not cards:
        return dict(env)
    chosen = [cards[int(number)] for number in numbers.split(",")]
    new = ",".join(str(card.index) for card in chosen)
    visible = env.get(VISIBLE, "")
    if visible == numbers:
        visible = new
    elif visible.startswith("GPU-"):
        visible = ",".join(card.uuid for card in chosen)
    return {**env, GPUS_VARIABLE: new, VISIBLE: visible}


def _argv(argv: Sequence[str], ports: Mapping[int, int]) -> list[str]:
    """Return a command line with its ports replaced: after an option that is named for one, and in URLs."""
    return [
        str(ports.get(int(word), word))
        if word.isdigit() and option.endswith("port")
        else _url(word, ports)
        for option, word in zip(["", *argv], argv, strict=False)
    ]


def _url(text: str, ports: Mapping[int, int]) -> str:
    return LOOPBACK_PORT.sub(lambda found: str(ports.get(int(found[0]), found[0])), text)


def _smoke(check: SmokeCheck, cards: Mapping[int, NamedGpu]) -> SmokeCheck:
    """Return the check of the new cards: what passed on others tells nothing about them."""
    process = replace(check.process, env=_env(check.process.env, cards))
    if process.env == check.process.env:
        return check
    known = json.dumps([check.marker, process.env[GPUS_VARIABLE], process.env[VISIBLE]])
    place, dash, _ = check.marker.rpartition("-")
    new = {str(old): str(card.index) for old, card in cards.items()}
    subject = re.sub(r"(?<=GPU )\d+", lambda found: new.get(found[0], found[0]), check.subject)
    marker = f"{place}{dash}{hashlib.sha256(known.encode()).hexdigest()[:16]}"
    return replace(check, process=process, marker=marker, subject=subject)
