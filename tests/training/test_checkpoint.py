"""Checkpoints: a layout engines load, complete or absent, verified, replaced safely, and an exact resume."""

import json
import os
import random
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import ClassVar

import anyio
import numpy as np
import pytest
import torch
from torch.distributed.checkpoint.staging import StagingOptions
from transformers import AutoModelForCausalLM, AutoTokenizer

from rollouts.manifest import manifest_problems
from rollouts.training import checkpoint
from rollouts.training.checkpoint import CheckpointError, latest_checkpoint, list_checkpoints
from rollouts.training.loops.train_step import train_step
from rollouts.training.model_files import read_model
from rollouts.training.optimizer_state import Staging
from tests.training.backends.test_pytorch import sft_batch
from tests.training.tiny import tiny_backend, tiny_model


def save(backend, step: int, extra: dict | None = None) -> Path:
    return anyio.run(lambda: backend.save_checkpoint(step, {"loss": 0.5}, extra))


def test_layout_is_what_an_engine_and_a_resume_need(tmp_path):
    """Goal: weights, config and tokenizer load from the directory as it stands. Red with the tokenizer left out."""
    backend = tiny_backend(tmp_path / "sft")
    path = save(backend, 123, {"cursor": 7})
    assert path == tmp_path / "sft" / "step_000123"
    model = AutoModelForCausalLM.from_pretrained(path)
    ids = torch.tensor([[2, 3, 4]])
    assert torch.equal(model(input_ids=ids).logits, backend.model(input_ids=ids).logits)
    assert AutoTokenizer.from_pretrained(path).eos_token == "<eos>"
    metadata = json.loads((path / "metadata.json").read_text())
    assert metadata.pop("time") > 1.7e9
    assert metadata.pop("versions")["torch"] == torch.__version__
    assert metadata == {"stage": "sft", "step": 123, "metrics": {"loss": 0.5}, "world_size": 1}
    assert {"generation_config.json", "training_state.pt", "manifest.json"} <= {
        file.name for file in path.iterdir()
    }
    assert manifest_problems(path) == ()
    # relative: it survives being copied
    assert os.readlink(tmp_path / "sft" / "latest") == "step_000123"
    assert not list((tmp_path / "sft").glob(".*"))


def test_steps_are_ordered_as_numbers(tmp_path):
    """Goal: step 1000000 comes after 999999. Red with sorted() on the names; incomplete ones never count."""
    for step in (1_000_000, 999_999, 2):
        directory = tmp_path / checkpoint.step_name(step)
        directory.mkdir()
        (directory / "manifest.json").write_text("{}")
    (tmp_path / "step_2000000").mkdir()  # no manifest: never completed
    (tmp_path / "latest").symlink_to("step_000002")
    assert [path.name for path in list_checkpoints(tmp_path)] == [
        "step_000002",
        "step_999999",
        "step_1000000",
    ]
    assert latest_checkpoint(tmp_path).name == "step_1000000"
    assert latest_checkpoint(tmp_path / "absent") is None


def test_saving_a_step_again_replaces_it(tmp_path):
    """Goal: the second save of a step is the one that stands. Red without setting the first aside: rename fails."""
    backend = tiny_backend(tmp_path)
    save(backend, 1, {"cursor": 1})
    path = save(backend, 1, {"cursor": 2})
    assert manifest_problems(path) == ()
    assert checkpoint.read_training_state(path)["extra"] == {"cursor": 2}
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["latest", "step_000001"]


def test_a_killed_writer_leaves_nothing_that_counts(tmp_path):
    """Goal: half a checkpoint is cleared, and one that was being replaced comes back. Red with _recover off."""
    backend = tiny_backend(tmp_path)
    first = save(backend, 1)
    half = tmp_path / ".tmp-step_000002-99"
    shutil.copytree(first, half)
    first.rename(tmp_path / ".old-step_000001")  # killed between the two renames
    (tmp_path / ".tmp-latest-99").symlink_to("step_000002")
    assert list_checkpoints(tmp_path) == []
    save(backend, 3)
    assert [path.name for path in list_checkpoints(tmp_path)] == ["step_000001", "step_000003"]
    assert not list(tmp_path.glob(".*"))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda path: (path / "manifest.json").unlink(), "was never completed"),
        (lambda path: (path / "model.safetensors").unlink(), "model.safetensors: missing"),
        (lambda path: (path / "training_state.pt").write_bytes(b"x"), "the manifest says"),
        (
            lambda path: flip_a_byte(path / "model.safetensors"),
            "its bytes differ from the manifest",
        ),
        (shutil.rmtree, "no such checkpoint directory"),
    ],
)
def test_a_damaged_checkpoint_is_refused(tmp_path, damage, message):
    """Goal: no run continues from a broken copy. Red with the manifest not read on load."""
    backend = tiny_backend(tmp_path)
    path = save(backend, 1)
    damage(path)
    with pytest.raises(CheckpointError, match=message):
        anyio.run(backend.load_checkpoint, path)


def flip_a_byte(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def test_weights_of_another_architecture_are_refused(tmp_path):
    """Goal: every tensor of the model comes from the file. Red with strict=False: the head keeps its random start."""
    path = save(tiny_backend(tmp_path), 1)
    with pytest.raises(CheckpointError, match=r"no tensor for lm_head.weight: saved from another"):
        read_model(tiny_model(tied=False), path)
    deeper = tiny_model()
    deeper.resize_token_embeddings(30)
    with pytest.raises(
        CheckpointError,
        match=r"model.embed_tokens.weight \(24, 16\), this model has shape \(30, 16\)",
    ):
        read_model(deeper, path)


def test_sharded_weights_load(tmp_path):
    """Goal: large models, saved in several files, come back whole. Red with model.safetensors alone being read."""
    model = tiny_model(seed=5)
    model.save_pretrained(tmp_path, max_shard_size="5KB")
    assert (tmp_path / "model.safetensors.index.json").is_file()
    other = tiny_model(seed=6)
    read_model(other, tmp_path)
    assert all(
        torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True)
    )


def test_load_restores_everything_that_training_depends_on(tmp_path):
    """Goal: N + load + N equals 2N bit for bit, in a fresh backend with other weights and generators elsewhere.

    Red with the optimizer's state, the step (the schedule's) or any one generator's state not restored.
    """

    def options():
        return {"lr_schedule": lambda step: 1.0 / (1 + step)}

    async def steps(backend, seeds):
        for seed in seeds:
            await train_step(backend, sft_batch(seed=seed), 3)

    def draws():
        return random.random(), float(np.random.random()), float(torch.rand(()))

    backend = tiny_backend(tmp_path, **options())
    anyio.run(steps, backend, range(2))
    path = save(backend, 2, {"cursor": [1, "a", {"b": 2.5}]})
    expected_draws = draws()
    anyio.run(steps, backend, range(2, 4))

    other = tiny_backend(tmp_path, seed=9, **options())
    state = anyio.run(other.load_checkpoint, path)
    assert draws() == expected_draws
    assert (state["step"], state["stage"], state["metrics"]) == (2, tmp_path.name, {"loss": 0.5})
    assert state["extra"] == {"cursor": [1, "a", {"b": 2.5}]}
    anyio.run(steps, other, range(2, 4))
    for a, b in zip(backend.model.parameters(), other.model.parameters(), strict=True):
        assert torch.equal(a, b)
    assert backend.step == other.step == 4


def test_extra_that_could_not_be_loaded_is_refused_when_saved(tmp_path):
    """Goal: an object in the data cursor is an error now, not at the resume. Red without the check: it is saved."""
    with pytest.raises(
        TypeError,
        match="extra of the checkpoint of step 1: needs plain data: Object of type object",
    ):
        save(tiny_backend(tmp_path), 1, {"cursor": object()})
    assert list_checkpoints(tmp_path) == []


def test_the_learning_rate_of_the_config_holds_after_a_resume(tmp_path):
    """Goal: a resumed run uses the rate it was given. Red with the base rates read from the loaded optimizer."""
    path = save(tiny_backend(tmp_path, lr=0.1), 1)
    backend = tiny_backend(tmp_path, lr=0.2)

    async def main():
        await backend.load_checkpoint(path)
        return (await train_step(backend, sft_batch(), None))["lr"]

    assert anyio.run(main) == 0.2


def test_save_weights_is_a_model_directory_and_nothing_else(tmp_path):
    """Goal: engines get weights and config, complete when they appear. Red with the optimizer's state beside them."""
    backend = tiny_backend(tmp_path / "rl")
    for _ in range(2):  # a version may be written again after a restart
        path = anyio.run(backend.save_weights, tmp_path / "weights" / "version_000001")
    assert {file.name for file in path.iterdir()} == {
        "config.json",
        "generation_config.json",
        "model.safetensors",
    }
    model = AutoModelForCausalLM.from_pretrained(path)
    assert all(
        torch.equal(a, b)
        for a, b in zip(model.parameters(), backend.model.parameters(), strict=True)
    )
    assert [entry.name for entry in path.parent.iterdir()] == ["version_000001"]


def test_tied_weights_are_written_once(tmp_path):
    """Goal: a tied head is in the file once and loads tied (vllm#51665). Red with state_dict() saved as it stands."""
    path = anyio.run(tiny_backend(tmp_path).save_weights, tmp_path / "weights")
    import safetensors.torch

    assert "lm_head.weight" not in safetensors.torch.load_file(path / "model.safetensors")
    model = AutoModelForCausalLM.from_pretrained(path)
    assert model.lm_head.weight is model.model.embed_tokens.weight


class _Stager:
    """A stager that takes notes: pinned memory needs a GPU."""

    made: ClassVar[list[StagingOptions]] = []

    def __init__(self, options: StagingOptions) -> None:
        self.made.append(options)

    def stage(self, tensors: dict) -> dict:
        return tensors


def test_a_gpus_state_is_staged_into_pinned_memory_that_is_kept():
    """Goal: one pinned stager for all copies of a GPU's tensors, and none for a CPU's. Red with one for each copy."""
    _Stager.made = []
    staging = Staging(_Stager)
    gpu = SimpleNamespace(device=torch.device("cuda"))
    for tensors in ({"a": torch.ones(1)}, {"a": torch.ones(1), "b": gpu}, {"b": gpu}):
        assert staging.copy(tensors) == tensors
    assert [(made.use_pinned_memory, made.use_non_blocking_copy) for made in _Stager.made] == [
        (False,) * 2,
        (True,) * 2,
    ]
