"""kill -9 of the real trainer at random points, resumed from `latest`: the run ends as if nothing had happened."""

import json
import random
import re
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
import torch.distributed.checkpoint as dcp

from base_config import Config, LoraConfig, MuonConfig
from rollouts.run_dir import RunDir
from tests.example_config import example_config, kl, replace_at
from tests.ports import free_port
from tests.training.process_nursery import has_ended, shared

WAIT_S = 120.0
LATE_MAX = 4  # kills that hit nothing
SFT_STEPS, RL_STEPS = 16, 8
STEPS = {"sft": SFT_STEPS, "rl": RL_STEPS}
CHECKPOINT_EVERY = {"sft": 3, "rl": 2}
TENSOR_FILES = (".safetensors", ".distcp")
# of this machine and moment, not of the run
MEASURED = re.compile(r"time|.*_s|mfu|peak_memory_gib")


def changed(config: Config, changes: dict[str, Any]) -> Config:
    for path, value in changes.items():
        config = replace_at(config, path, value)
    assert config.problems() == ()
    return config


SFT = changed(
    example_config(),
    {
        "output.mode": "sft",
        "data.sft_mixture.0.max_samples": 100,
        "data.eval_mixture": [],
        "sft.num_iterations": SFT_STEPS,
        "sft.checkpoint_every": CHECKPOINT_EVERY["sft"],
        "sft.optimizer.schedule": "cosine",
        "sft.optimizer.warmup_frac": 0.2,
    },
)
RL = {
    "output.mode": "rl",
    "model.init": "pretrained",
    "data.rl_mixture.0.max_samples": 4 * RL_STEPS,
    "rl.sampling.over_sampling_factor": 1.5,  # surplus groups are carried from step to step, and over a resume
    "rl.kl": kl(coef=0.05),
    "rl.save_every": CHECKPOINT_EVERY["rl"],
}
LORA = LoraConfig(rank=4, alpha=8.0, dropout=0.1, target_modules="all-linear", init_seed=0)
MUON = MuonConfig(
    momentum=0.9,
    nesterov=True,
    ns_steps=5,
    adjust_lr="match_rms_adamw",
    vector_lr=1e-3,
    width_reference=-1,
)
SFT_KINDS = {
    "adamw": SFT,
    "muon": changed(SFT, {"sft.optimizer": replace(SFT.sft.optimizer, muon=MUON)}),
    "lora": changed(
        SFT,
        {"model.lora": LORA}
        | {
            f"{stage}.{rate}": 0.0
            for stage in ("sft", "rl")
            for rate in ("embedding_lr", "unembedding_lr")
        },
    ),
}


@dataclass
class Attempt:
    """One process of a run, from its start or a checkpoint to its end or its death."""

    run: RunDir
    stage: str
    pid: int
    engine: int | None

    def steps(self) -> dict[int, dict[str, Any]]:
        """What it logged by step, but for measurements. Every line must be whole but the last, which death may tear."""
        lines = self.run.metrics.read_text().split("\n") if self.run.metrics.exists() else [""]
        rows = [json.loads(line) for line in lines[:-1]]
        return {
            row["step"]: {key: value for key, value in row.items() if not MEASURED.fullmatch(key)}
            for row in rows
        }

    def samples(self) -> list[dict[str, Any]]:
        lines = self.run.rollouts.read_text().split("\n")[:-1] if self.run.rollouts.exists() else []
        return [
            {key: value for key, value in json.loads(line).items() if not MEASURED.fullmatch(key)}
            for line in lines
        ]

    def log(self) -> str:
        return "".join(file.read_text() for file in sorted(self.run.path.glob("*.log")))

    @property
    def checkpoints(self) -> Path:
        return self.run.checkpoints / self.stage


def start(config: Config, directory: Path) -> Attempt:
    """The trainer of `config`'s only stage in a run directory, beside its engine if it has one."""
    directory.mkdir(parents=True)
    (stage,) = config.stages
    run, argv, engine = RunDir(directory), [], None
    if stage == "rl":
        port = free_port()
        model = config.output.source_checkpoint or config.model.name
        flags = ["--model-path", model, "--port", str(port), "--max-running-requests", "256"]
        engine = shared().start("rollouts.engines.embedded", flags, directory / "engine.log")
        argv = ["--engine-url", f"http://127.0.0.1:{port}"]
        wait_for(lambda: is_healthy(argv[1]), engine)
    config.save(run.config)
    arguments = ["--run-dir", str(directory), "--stage", stage, *argv]
    pid = shared().start("rollouts.worker.trainer", arguments, directory / "trainer.log")
    return Attempt(run, stage, pid, engine)


def is_healthy(url: str) -> bool:
    try:
        return httpx.get(f"{url}/health", timeout=60).status_code == 200
    except httpx.TransportError:
        return False


def wait_for(condition: Callable[[], bool], pid: int) -> None:
    """Return once `condition` holds, or process `pid` has ended."""
    deadline = time.monotonic() + WAIT_S
    while not condition() and not has_ended(pid):
        assert time.monotonic() < deadline, f"waited {WAIT_S:g} s for process {pid}"
        time.sleep(0.002)


def finish(attempt: Attempt) -> Attempt:
    code = shared().wait(attempt.pid)
    if attempt.engine is not None:
        shared().kill(attempt.engine)
    assert code == 0, attempt.log()
    return attempt


def kill_at_random(attempt: Attempt, rng: random.Random, *, completed: int) -> None:
    """kill -9 once `completed` checkpoints stand, at a random moment of the next steps or of the next checkpoint."""
    every = CHECKPOINT_EVERY[attempt.stage]
    wait_for(lambda: len(list(attempt.checkpoints.glob("step_*"))) >= completed, attempt.pid)
    if rng.random() < 0.5:
        count = len(attempt.steps()) + rng.randint(0, every)
        wait_for(lambda: len(attempt.steps()) >= count, attempt.pid)
    else:
        wait_for(lambda: any(attempt.checkpoints.glob(".tmp-step_*")), attempt.pid)
    time.sleep(rng.random() * 0.03)
    code = shared().kill(attempt.pid)
    if attempt.engine is not None:
        shared().kill(attempt.engine)
    assert code in (0, -9), attempt.log()  # 0: it was at its end


def killed_and_resumed(config: Config, directory: Path, seed: int) -> list[Attempt]:
    """All attempts of a run that is killed twice; each goes on from the last one's `latest`, if there is one."""
    rng, attempts = random.Random(seed), []
    for number in range(2 + LATE_MAX):
        attempt, before = start(config, directory / f"attempt_{number}"), len(attempts)
        kill_at_random(attempt, rng, completed=rng.randint(1 - before, 2 - before))
        latest = attempt.checkpoints / "latest"
        at_end = latest.exists() and latest.resolve().name == f"step_{STEPS[attempt.stage]:06d}"
        if at_end and not attempts:
            continue  # the kill was late, on a busy machine: nothing could be resumed
        attempts.append(attempt)
        if at_end:
            return attempts  # killed after its last checkpoint: no step is left to resume for
        if latest.exists():
            config = replace_at(config, "output.source_checkpoint", str(latest))
        if len(attempts) == 2:
            return [*attempts, finish(start(config, directory / "last"))]
    raise AssertionError(f"{LATE_MAX + 1} kills came after the last checkpoint")


def check(attempts: list[Attempt], whole: Attempt, steps: int) -> None:
    """Every line that any attempt logged is the undisturbed run's, none is missing, and it ends with the same bytes."""
    expected = whole.steps()
    assert max(min(attempt.steps(), default=1) for attempt in attempts) > 1, "nothing was resumed"
    assert list(expected) == list(range(1, steps + 1))
    seen: set[int] = set()
    for attempt in attempts:
        for step, row in attempt.steps().items():
            assert row == expected[step], f"{attempt.run.path.name} step {step}"
            seen.add(step)
    assert seen == set(expected)
    links = [attempt.checkpoints / "latest" for attempt in (*attempts, whole)]
    # the last attempt may have had nothing left to do
    paths = [link.resolve() for link in links if link.exists()][-2:]
    assert paths[0].name == paths[1].name
    names = [
        {str(file.relative_to(path)) for file in path.rglob("*") if file.suffix in TENSOR_FILES}
        for path in paths
    ]
    assert names[0] == names[1] and names[0]
    for name in names[0]:
        assert (paths[0] / name).read_bytes() == (paths[1] / name).read_bytes(), name
    found, expected_state = (optimizer_tensors(path / "optimizer") for path in paths)
    assert found
    assert same(found, expected_state)
    states = [torch.load(path / "training_state.pt", weights_only=True) for path in paths]
    # Python's and NumPy's generators, which nothing uses, were scrambled
    for key in states[1].keys() - {"rng"}:
        assert same(states[0][key], states[1][key]), key


def optimizer_tensors(directory: Path) -> dict[str, torch.Tensor]:
    """The optimizer's state of a checkpoint, by "<parameter>.<entry>"."""
    reader = dcp.FileSystemReader(directory)
    saved = reader.read_metadata().state_dict_metadata
    tensors = {
        key: torch.empty(item.size, dtype=item.properties.dtype) for key, item in saved.items()
    }
    dcp.load(tensors, storage_reader=reader, no_dist=True)
    return tensors


def same(one: Any, other: Any) -> bool:
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(
            same(value, other[key]) for key, value in one.items()
        )
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(same, one, other))
    return bool(one == other)


@pytest.fixture(scope="module")
def whole_sft(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Attempt]:
    """The undisturbed SFT run of each kind, made when first asked for."""
    made: dict[str, Attempt] = {}

    def get(kind: str) -> Attempt:
        if kind not in made:
            directory = tmp_path_factory.mktemp(kind) / "whole"
            made[kind] = finish(start(SFT_KINDS[kind], directory))
        return made[kind]

    return get


@pytest.mark.parametrize(("kind", "seed"), [("adamw", 0), ("adamw", 1), ("muon", 3), ("lora", 4)])
def test_sft(whole_sft: Callable[[str], Attempt], tmp_path: Path, kind: str, seed: int) -> None:
    """Goal: two kills -9 change no metric and no byte of weights or optimizer state.

    Red with the generators' state not restored (LoRA's dropout), with the optimizer's not restored (Muon), and with
    `latest` moved before the checkpoint is whole.
    """
    check(killed_and_resumed(SFT_KINDS[kind], tmp_path, seed), whole_sft(kind), SFT_STEPS)


@pytest.fixture(scope="module")
def whole_rl(
    whole_sft: Callable[[str], Attempt], tmp_path_factory: pytest.TempPathFactory
) -> tuple[Config, Attempt]:
    """RL from the model that SFT made, undisturbed."""
    model = str(whole_sft("adamw").checkpoints / f"step_{SFT_STEPS:06d}")
    config = changed(example_config(), {**RL, "model.name": model, "data.eval_mixture": []})
    return config, finish(start(config, tmp_path_factory.mktemp("rl") / "whole"))


@pytest.mark.parametrize("seed", [10, 11])
def test_rl(whole_rl: tuple[Config, Attempt], tmp_path: Path, seed: int) -> None:
    """Goal: as in SFT, with the prompts, the carried groups, the KL reference and every sample of the engine's.

    Red with the carried groups not restored, and with the reference loaded from the checkpoint.
    """
    config, whole = whole_rl
    attempts = killed_and_resumed(config, tmp_path, seed)
    check(attempts, whole, RL_STEPS)
    expected = whole.samples()
    for attempt in attempts:
        found = attempt.samples()
        first = next(
            (index for index, sample in enumerate(expected) if sample["step"] == found[0]["step"]),
            None,
        )
        assert first is not None and found == expected[first : first + len(found)]
