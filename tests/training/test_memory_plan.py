"""The memory plan's closed form beside torch's tracker, running our training step on fake tensors.

`benchmarks/memory_plan.py` does so at full size. Here models have one layer and a small vocabulary: all layers hold the
same, and fake operations take as long whatever their size.
"""

import dataclasses

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from base_config import Config, LoraConfig, MuonConfig, load_config
from benchmarks.memory_plan import CARD, GIB, ROOT, planned, stages, tracked
from rollouts.remote.inputs.shapes import DENSE, EXPERTS, HUB, shape_of
from rollouts.remote.plan.memory import training_memory as training
from rollouts.training import head_ways, optim
from rollouts.training.backends.fsdp import defers_reduction
from tests.example_config import replace_at

SMALL = {"vocab_size": 16_384, "num_hidden_layers": 1}
STAGES = {f"{name}-{stage}": (config, stage) for name, config, stage in stages()}
QWEN3 = {
    "model_type": "qwen3",
    "hidden_size": 1024,
    "intermediate_size": 3072,
    "num_attention_heads": 16,
}
QWEN3 |= {"num_key_value_heads": 8, "head_dim": 128, "tie_word_embeddings": True, **SMALL}
LORA = LoraConfig(rank=16, alpha=32.0, dropout=0.0, target_modules="all-linear", init_seed=0)
MUON = MuonConfig(
    momentum=0.9,
    nesterov=True,
    ns_steps=5,
    adjust_lr="original",
    vector_lr=1e-3,
    width_reference=-1,
)


def assert_near(plan: int, found: int, share: float = 0.1) -> None:
    assert abs(plan / found - 1) <= share, (
        f"plan {plan / GIB:.3f} GiB, tracker {found / GIB:.3f} GiB"
    )


@pytest.mark.parametrize("which", STAGES)
def test_each_shipped_training_step(which: str) -> None:
    """Goal: the plan's tensors are within a tenth of what the tracker sees at the peak of each shipped training step.

    Red with one copy of the head's chunk, and with a layer's own activations left out under checkpointing.
    """
    config, stage = STAGES[which]
    model = {**HUB[config.model.name], **SMALL}
    (plan, plan_optimizer), (found, found_optimizer) = (
        planned(config, stage, model),
        tracked(config, stage, model),
    )
    assert_near(plan, found)
    # of sharded ones the tracker counts whole tensors that torch only reasons of
    if config.target.sharding == "none":
        assert_near(plan_optimizer, found_optimizer)


def base() -> Config:
    return load_config(ROOT / "configs" / "nanochat_sft_rl.py")


def with_muon(config: Config) -> Config:
    assert config.sft is not None
    return replace_at(config, "sft.optimizer", dataclasses.replace(config.sft.optimizer, muon=MUON))


WAYS = {
    "float32, a head of its own": (
        replace_at(base(), "model.dtype", "float32"),
        {**QWEN3, "tie_word_embeddings": False},
    ),
    "some adapters, large": (
        replace_at(
            base(),
            "model.lora",
            dataclasses.replace(LORA, rank=512, target_modules=["q_proj", "down_proj"]),
        ),
        QWEN3,
    ),
    "Muon": (with_muon(base()), QWEN3),
}


@pytest.mark.parametrize("way", WAYS)
def test_other_ways_to_train(way: str) -> None:
    """Goal: likewise for what no shipped GPU config sets. Red with adapters' frozen norms taken for trained ones, with
    Muon's state counted twice, and with bytes of bfloat16 in float32."""
    config, model = WAYS[way]
    (plan, plan_optimizer), (found, found_optimizer) = (
        planned(config, "sft", model),
        tracked(config, "sft", model),
    )
    assert_near(plan, found)
    assert_near(plan_optimizer, found_optimizer)


def test_the_form_is_linear_in_layers_and_whole_vocabularies_fit() -> None:
    """Goal: two more layers, and the whole vocabulary, are the plan's within 2 %. Red with a norm of each layer, or
    the norms' float32 copies, left out, and with the gradient of the output head in bfloat16."""
    config, _ = STAGES["sft_openwebtext-sft"]
    for change in ({**SMALL, "num_hidden_layers": 3}, {"num_hidden_layers": 1}):
        model = {**HUB["Qwen/Qwen2.5-0.5B"], **change}
        assert_near(planned(config, "sft", model)[0], tracked(config, "sft", model)[0], 0.02)


@pytest.mark.parametrize("kind", [*DENSE, *EXPERTS])
def test_parameters_are_transformers_own(kind: str) -> None:
    """Goal: each shape has as many parameters as the model that transformers builds of the same config.json, and the
    sizes that Muon moves. Red with the router, a bias or a tied head counted otherwise."""
    experts = (
        {"num_experts": 4, "moe_intermediate_size": 24, "shared_expert_intermediate_size": 40}
        if "moe" in kind
        else {}
    )
    more = {"mlp_only_layers": [0]} if "moe" in kind else {}
    sizes = {
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    }
    for tied in (True, False):
        fields = {
            **sizes,
            **experts,
            **more,
            "num_hidden_layers": 3,
            "vocab_size": 200,
            "tie_word_embeddings": tied,
            "pad_token_id": 0,
        }
        config = AutoConfig.for_model(kind, **fields)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
        shape = shape_of(config.to_dict())
        assert shape.parameters == sum(parameter.numel() for parameter in model.parameters())
        named = [
            pair
            for pair in model.named_parameters()
            if "embed_tokens" not in pair[0] and "lm_head" not in pair[0]
        ]
        assert shape.matrices == sum(
            parameter.numel() for _, parameter in named if parameter.ndim > 1
        )


def test_the_rules_that_are_repeated_here() -> None:
    """Goal: what the plan repeats, since its side has no torch, is the library's. Red after a change to either."""
    for gib in (4, 16, 24, 80):
        chunk = head_ways.cuda_chunk_elements(gib * GIB, compiled=True)
        fitting = gib * GIB // training.HEAD_SHARE
        assert chunk == min(training.HEAD_ELEMENTS, 2 ** (fitting.bit_length() - 1))
    assert training.MUON_ELEMENTS == optim._NS_ELEMENTS
    card = CARD.total
    assert card is not None
    assert defers_reduction(card // training.REDUCTION_SHARE, card)
    assert not defers_reduction(card // training.REDUCTION_SHARE + 1, card)
