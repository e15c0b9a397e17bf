"""Sharded training: two and four gloo ranks give what one plain rank gives."""

import json
from functools import partial
from pathlib import Path

import anyio
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from rollouts.run_dir import read_jsonl
from rollouts.training import checkpoint
from rollouts.training.backends import FSDPConfig, FSDPTrainingBackend
from rollouts.training.backends.fsdp import defers_reduction
from rollouts.training.reference import Reference
from rollouts.training.rl_losses import sft_loss
from tests.training import fsdp_ranks
from tests.training.fsdp_ranks import EXACT, STRATEGIES, adamw, model_of, plain, sft
from tests.training.process_nursery import shared
from tests.training.test_distributed import mean_differences, without_times
from tests.training.tiny import tiny_model

REPOSITORY = Path(__file__).resolve().parents[3]
SHARED = tiny_model()


def torchrun(directory: Path, ranks: int) -> list[dict]:
    """The results of each rank."""
    shared().torchrun(ranks, "tests.training.fsdp_ranks", [str(directory)], directory)
    return [json.loads((directory / f"rank_{rank}.json").read_text()) for rank in range(ranks)]


@pytest.fixture(scope="module")
def one(tmp_path_factory) -> tuple[Path, dict]:
    """The work of one plain rank, in this process; "from_one" holds its checkpoint after 3 steps."""
    directory = tmp_path_factory.mktemp("one")
    found = {"sft": anyio.run(sft, plain(directory / "from_one"))}
    found["uneven"] = anyio.run(fsdp_ranks.uneven, plain(directory / "uneven"))
    found["lora"] = anyio.run(fsdp_ranks.lora, plain, directory / "lora")
    found["rl"] = anyio.run(fsdp_ranks.rl, plain, directory / "rl")
    found["resumed"] = anyio.run(fsdp_ranks.resume_plain, plain, directory)
    return directory, found


@pytest.fixture(scope="module")
def two(tmp_path_factory, one) -> tuple[Path, list[dict]]:
    directory = tmp_path_factory.mktemp("two")
    (directory / "from_one").symlink_to(one[0] / "from_one")
    return directory, torchrun(directory, 2)


def assert_same_training(found: list[dict], expected: list[dict]) -> None:
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        assert without_times(one) == pytest.approx(without_times(other), rel=1e-5, abs=1e-7)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_sharded_ranks_train_as_one(two, one, strategy):
    """Goal: loss, gradient norm and weights are those of one plain rank, in fp32 to 1e-5, whatever is sharded.

    Red with set_gradient_divide_factor left out (means over ranks), without the broadcast, and with blank
    micro-batches that keep their loss mask.
    """
    directory, ranks = two
    for rank in ranks:
        assert_same_training(rank[strategy], one[1]["sft"])
    expected = load_file(one[0] / "from_one" / "latest" / "model.safetensors")
    for path in (directory / strategy / "weights", directory / strategy / "latest"):
        found = load_file(path / "model.safetensors")
        assert found.keys() == expected.keys() and "lm_head.weight" not in found  # tied: once
        apart = {name: (found[name] - expected[name]).abs().max() for name in expected}
        # softmax does not see a bias of the keys: its gradient is rounding, which AdamW makes a step of
        assert all(
            apart[name] < (1e-3 if name.endswith("k_proj.bias") else 1e-5) for name in expected
        ), apart
    assert (
        type(AutoModelForCausalLM.from_pretrained(directory / strategy / "weights")).__name__
        == "Qwen2ForCausalLM"
    )


def test_what_a_rank_holds(two):
    """Goal: half of the parameters and of the optimizer's state per rank, but with NO_SHARD. Red with its mesh."""
    for rank in two[1]:
        shares = {name: rank[f"{name} facts"]["share"] for name in STRATEGIES}
        assert shares.pop("none") == 1.0
        assert all(0.47 < share < 0.53 for share in shares.values()), shares
        assert all(rank[f"{name} facts"]["sharded_state"] for name in STRATEGIES)


def test_what_each_option_does(two):
    """Goal: layers are freed after they ran, or kept; and computed again for the backward pass where that is wanted.

    Red with reshard_after_forward=True throughout, and with gradient_checkpointing_enable left out.
    """
    for rank in two[1]:
        freed = {name: rank[f"{name} facts"]["freed"] for name in STRATEGIES}
        assert freed == {
            "full": True,
            "grad_op": False,
            "none": False,
            "offload": True,
            "recompute": True,
        }
        runs = {name: rank[f"{name} facts"]["layer_runs"] for name in STRATEGIES}
        backward_passes = 3 * 2  # steps, micro-batches
        assert runs["recompute"] == runs["full"] + backward_passes


def test_a_step_reduces_once(two, one):
    """Goal: one reduction of each layer and of the root in an optimizer step, however many micro-batches, and the
    losses of one rank. Red with a reduction at every micro-batch: 18.
    """
    for rank in two[1]:
        assert rank["counted"]["reductions"] == 3 * 3  # steps; two layers and the root
        assert_same_training(rank["counted"]["metrics"], one[1]["sft"])


def test_compiled_layers_train_as_one(two, one):
    """Goal: compiled, sharded and computed again, two ranks have one plain rank's losses; at most two compilations
    after the first, in training and validation. Red with layers that are looked for once sharding has renamed them.
    """
    for rank in two[1]:
        assert_same_training(rank["compiled"]["metrics"], one[1]["sft"])
        assert rank["compiled"]["works"] == [True, True]
        assert rank["compiled"]["compilations"] <= 3


def test_the_backward_pass_gathers_a_layer_ahead(two):
    """Goal: when a layer computes its gradient, the layer before it is being gathered, recomputed or not.

    FSDP2 does so by itself. Red with set_modules_to_backward_prefetch([itself]) for each layer: 1, then 2.
    """
    for rank in two[1]:
        assert rank["full gathered"] == rank["recompute gathered"] == [2, 2]


def test_hybrid_sharding_is_two_copies_in_halves(tmp_path, one):
    """Goal: four ranks, two per copy, give the one rank's numbers, and a checkpoint that goes on plain.

    Red with the gradients' divide factor left out.
    """
    for rank in torchrun(tmp_path, 4):
        assert_same_training(rank["hybrid"], one[1]["sft"])
        assert 0.47 < rank["hybrid facts"]["share"] < 0.53
    assert_same_training(
        go_on_plain(tmp_path / "hybrid" / "latest", tmp_path / "plain"), one[1]["resumed"]
    )


def go_on_plain(path: Path, directory: Path) -> list[dict]:
    backend = plain(directory, seed=6)

    async def main():
        return await sft(backend, num_steps=5, resume=await backend.load_checkpoint(path))

    return anyio.run(main)


def test_a_loss_of_ones_own_gets_logits(two, one):
    """Goal: a loss that reads [B, T, V] trains sharded too, by the model's own forward. Red with log-probs of it."""
    for rank in two[1]:
        assert_same_training(rank["logits"], one[1]["sft"])


def test_ranks_with_fewer_micro_batches_take_part(two, one):
    """Goal: 3 sequences on 2 ranks, 1 on 2, and bins of tokens neither hang nor count twice.

    Red without the blank micro-batches: the ranks wait for each other until the time-out.
    """
    for rank in two[1]:
        assert_same_training(rank["uneven"], one[1]["uneven"])


def test_rl_with_every_part_and_a_resume(two, one):
    """Goal: ratios, KL to a sharded reference, entropy, clipped gradients, a resume in between: as on one plain rank.

    Red with the optimizer's state not restored, and with the norm of the local shards for clipping.
    """
    for rank in two[1]:
        assert_same_training(rank["rl"], one[1]["rl"])


def test_sharded_ranks_record_one_rank_s_log_probs(two, one):
    """Goal: each sample's `trainer_log_probs` are those that one plain rank records, and their mean difference from
    the sampler's is the one logged. Red with rank 0's rows alone, and with the rows in the batch's order.
    """
    found, expected = (
        read_jsonl(directory / "rl" / "rollouts.jsonl") for directory, _ in (two, one)
    )
    assert len(found) == len(expected) == 4 * 9  # steps, samples
    for row, alone in zip(found, expected, strict=True):
        assert row["tokens"] == alone["tokens"]
        assert row["trainer_log_probs"] == pytest.approx(alone["trainer_log_probs"], abs=1e-5)
    logged = {row["step"]: row["logp_diff_abs"] for row in two[1][0]["rl"]}
    assert mean_differences(found) == pytest.approx(logged, rel=1e-4)


def test_a_sharded_resume_is_exact(two):
    """Goal: N + resume + N steps equal 2N bit for bit, for as many ranks. Red without the optimizer's state."""
    for rank in two[1]:
        at_a_stretch, resumed = rank["exact"]
        assert [without_times(row) for row in resumed] == [
            without_times(row) for row in at_a_stretch
        ]


def test_sharded_adapters(two, one):
    """Goal: LoRA trains, resumes and exports merged weights sharded as it does plain. Red with the base exported."""
    for rank in two[1]:
        assert_same_training(rank["lora"], one[1]["lora"])
    paths = [directory / "lora" / "latest" for directory in (two[0], one[0])]
    for name in ("model.safetensors", "adapter/adapter_model.safetensors"):
        found, expected = (load_file(path / name) for path in paths)
        assert found.keys() == expected.keys()
        assert all((found[key] - expected[key]).abs().max() < 1e-5 for key in expected)


def test_a_plain_checkpoint_goes_on_sharded(two, one):
    """Goal: saved by 1 plain rank, continued by 2 sharded ones. Red with the optimizer's state not restored."""
    for rank in two[1]:
        assert_same_training(rank["resumed"], one[1]["resumed"])


def test_a_sharded_checkpoint_goes_on_plain(two, one, tmp_path):
    """Goal: saved by 2 sharded ranks, continued by 1 plain one, and verified first. Red with rank 0's shards alone."""
    path = two[0] / "full" / "latest"
    assert len(list((path / "optimizer").glob("*.distcp"))) == 2
    assert checkpoint.read_metadata(path)["world_size"] == 2
    assert_same_training(go_on_plain(path, tmp_path), one[1]["resumed"])


def test_mixed_precision_keeps_float32_weights_and_state(two, one):
    """Goal: bf16 compute, fp32 master weights and optimizer state (AReaL#1292). Red with the model cast to bf16."""
    for rank in two[1]:
        mixed = rank["mixed"]
        assert mixed["hidden"] == "torch.bfloat16"
        assert mixed["dtypes"] == ["torch.float32"]
        losses, exact = (
            [row["loss"] for row in rows] for rows in (mixed["metrics"], one[1]["sft"])
        )
        assert losses == pytest.approx(exact, rel=2e-2)
        assert losses != pytest.approx(exact, rel=1e-6)


@pytest.fixture
def alone():
    """A world of one that ends with the test."""
    yield
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def test_without_torchrun_it_is_a_world_of_one(tmp_path, one, alone):
    """Goal: the documented call works as it stands, in one process. Red without a group made for it."""
    backend = FSDPTrainingBackend(
        model=model_of(0),
        optimizer_fn=adamw,
        loss_fn=sft_loss,
        checkpoint_dir=tmp_path,
        config=EXACT,
        device="cpu",
    )
    assert_same_training(anyio.run(sft, backend), one[1]["sft"])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            partial(FSDPConfig, sharding_strategy="ZERO3"),
            "sharding_strategy='ZERO3': needs one of 'FULL_SHARD'",
        ),
        (
            partial(FSDPConfig, shard_group_size=2),
            "shard_group_size=2: needs None, since only 'HYBRID_SHARD'",
        ),
    ],
)
def test_bad_configs_are_named(make, message):
    """Goal: a wrong option fails when the config is made. Red with the checks off."""
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize(
    ("model", "options", "message"),
    [
        (
            partial(tiny_model, dtype=torch.bfloat16),
            {},
            "model has parameters in torch.bfloat16: needs float32",
        ),
        (
            lambda: SHARED,
            {"reference": Reference(SHARED, "base", "sha")},
            "reference: is the model itself with its",
        ),
        (
            tiny_model,
            {"compute_dtype": "bfloat16"},
            "compute_dtype: an option of PyTorchTrainingBackend",
        ),
        (partial(torch.nn.Linear, 2, 2), {}, "Linear does not say which of its modules are layers"),
        (
            tiny_model,
            {"config": FSDPConfig(sharding_strategy="HYBRID_SHARD", shard_group_size=2)},
            "shard_group_size=2: needs a divisor of the 1 ranks",
        ),
    ],
)
def test_bad_options_are_named(tmp_path, alone, model, options, message):
    """Goal: what cannot be sharded rightly is refused, with the fix. Red with the checks off."""
    with pytest.raises(ValueError, match=message):
        FSDPTrainingBackend(model(), adamw, sft_loss, tmp_path, device="cpu", **options)


@pytest.mark.parametrize(
    ("parameters", "device_gb", "once"),
    [
        (10**12, None, True),
        (1.5e9, 141, True),
        (1.5e9, 80, False),
        (0.5e9, 40, True),
        (7e9, 141, False),
    ],
)
def test_gradients_wait_whole_where_there_is_room(
    parameters: float, device_gb: float | None, once: bool
) -> None:
    """Goal: one reduction a step costs at most a sixteenth of the card. Red with room taken for granted."""
    device_bytes = None if device_gb is None else int(device_gb * 1e9)
    assert defers_reduction(int(4 * parameters), device_bytes) is once
