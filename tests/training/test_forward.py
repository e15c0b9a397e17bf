"""Packed against padded: the same log-probs and gradients for every architecture that is said to pack."""

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from rollouts.training import forward, packed_attention
from rollouts.training.rl_losses import sft_loss
from tests.training.tiny import EOS, VOCAB, sft_samples, tiny_model

SMALL = {
    "vocab_size": VOCAB,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "bos_token_id": None,
    "eos_token_id": EOS,
    "pad_token_id": None,
}
OPTIONS = {
    "gemma": {"head_dim": 4},
    "gemma3_text": {
        "head_dim": 4,
        "sliding_window": 3,
        "layer_types": ["sliding_attention", "full_attention"],
    },
    "mistral": {"sliding_window": 3},
    "qwen2": {"use_sliding_window": True, "sliding_window": 3, "max_window_layers": 1},
    "qwen2_moe": {
        "moe_intermediate_size": 8,
        "shared_expert_intermediate_size": 8,
        "num_experts": 4,
        "num_experts_per_tok": 2,
    },
    "qwen3": {"head_dim": 4},
    "qwen3_moe": {
        "moe_intermediate_size": 8,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "head_dim": 4,
    },
}


def model_of(kind: str, dtype: torch.dtype = torch.float64):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = AutoConfig.for_model(kind, **SMALL, **OPTIONS.get(kind, {}))
        return AutoModelForCausalLM.from_config(config, dtype=dtype).train()


def batch_of(side: str = "right", count: int = 6) -> dict[str, torch.Tensor]:
    samples = sft_samples(count)
    width = max(len(sample.tokens) for sample in samples)
    rows = []
    for sample in samples:
        padding = width - len(sample.tokens)
        shift = padding if side == "left" else 0
        row = [[*sample.tokens, *[EOS] * padding], [*[1] * len(sample.tokens), *[0] * padding]]
        row.append([*sample.loss_mask, *[0.0] * padding])
        rows.append([[*values[width - shift :], *values[: width - shift]] for values in row])
    ids, mask, loss_mask = (torch.tensor([row[i] for row in rows]) for i in range(3))
    return {
        "input_ids": ids,
        "labels": ids,
        "attention_mask": mask,
        "loss_mask": loss_mask.double(),
    }


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("kind", sorted(forward.PACKABLE))
def test_packed_equals_padded(kind, side):
    """Goal: leaving padding out changes neither log-probs nor gradients, windowed attention included.

    Red with positions that run on, with attention over the whole row, and with the window one token wider.
    """
    batch = batch_of(side)
    # its router is float32 whatever the rest is
    dtype = torch.float32 if kind.endswith("moe") else torch.float64
    plain, packed = model_of(kind, dtype), model_of(kind, dtype)
    assert forward.prepare(packed)
    logits = forward.padded_logits(plain, batch)
    keep = batch["loss_mask"][:, 1:] != 0
    expected = torch.log_softmax(logits[:, :-1][keep], -1)
    ours = forward.token_log_probs(packed, batch, with_entropy=True)
    targets = batch["labels"][:, 1:][keep]
    assert torch.equal(ours.keep, keep)
    torch.testing.assert_close(
        ours.log_probs_N, expected.gather(1, targets[:, None]).squeeze(1), rtol=0, atol=1e-6
    )
    torch.testing.assert_close(
        ours.entropy_N, -(expected.exp() * expected).sum(-1), rtol=0, atol=1e-6
    )
    sft_loss(logits, batch["labels"], batch["loss_mask"]).backward()
    sft_loss(ours, batch["labels"], batch["loss_mask"]).backward()
    for (name, a), b in zip(plain.named_parameters(), packed.parameters(), strict=True):
        torch.testing.assert_close(
            b.grad, a.grad, rtol=1e-5, atol=1e-6, msg=lambda m, name=name: f"{name}: {m}"
        )


def test_documents_do_not_see_each_other():
    """Goal: a document's log-probs are bit for bit the same whatever stands beside it (functionary#265).

    Red with attention over the whole row.
    """
    model = model_of("qwen2", torch.float32)
    forward.prepare(model)
    batch = batch_of()
    # the shortest stands last in the row: all others are before it
    last = int(batch["attention_mask"].sum(1).argmin())
    others = torch.arange(len(batch["input_ids"])) != last
    with torch.no_grad():
        before = forward.token_log_probs(model, batch, with_entropy=False)
        changed = batch["input_ids"].clone()
        changed[others] = 5
        after = forward.token_log_probs(model, {**batch, "input_ids": changed}, with_entropy=False)
    own = (before.keep & ~others[:, None])[before.keep]
    assert own.any()
    assert torch.equal(before.log_probs_N[own], after.log_probs_N[own])
    assert not torch.equal(before.log_probs_N[~own], after.log_probs_N[~own])


def test_packing_keeps_every_token_once():
    """Goal: the row holds each real token once, with its place in its document. Red with the batch's order kept."""
    batch = batch_of("left")
    packed = forward.pack(batch["input_ids"], batch["attention_mask"])
    real = batch["attention_mask"].bool()
    assert packed.documents.lengths == tuple(sorted(real.sum(1).tolist(), reverse=True))
    assert packed.documents.offsets.diff().tolist() == list(packed.documents.lengths)
    assert torch.equal(packed.input_ids[0][packed.rows_BT[real]], batch["input_ids"][real])
    assert (packed.rows_BT[~real] == -1).all()
    assert sorted(packed.rows_BT[real].tolist()) == list(range(int(real.sum())))
    starts = packed.documents.offsets[:-1].long()
    assert packed.position_ids[0][starts].tolist() == [0] * len(starts)
    assert (packed.position_ids[0].diff()[: packed.documents.lengths[0] - 1] == 1).all()


def test_a_prepared_model_generates_and_saves_as_before(tmp_path):
    """Goal: only packed batches run differently. Red with a registration that makes no masks."""
    plain, prepared = model_of("qwen2"), model_of("qwen2")
    forward.prepare(prepared)
    batch = batch_of("left")
    options = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": EOS, "min_new_tokens": 5}
    outputs = [
        model.eval().generate(batch["input_ids"], attention_mask=batch["attention_mask"], **options)
        for model in (plain, prepared)
    ]
    assert torch.equal(*outputs)
    torch.testing.assert_close(
        forward.padded_logits(plain, batch), forward.padded_logits(prepared, batch)
    )
    prepared.save_pretrained(tmp_path)
    assert packed_attention.ATTENTION not in (tmp_path / "config.json").read_text()
    assert AutoModelForCausalLM.from_pretrained(tmp_path).config._attn_implementation == "sdpa"


@pytest.mark.parametrize("kind", ["gpt2", "gemma2"])
def test_other_architectures_run_padded(kind):
    """Goal: what is not known to pack is left alone. Red with every model prepared."""
    names = (
        {"n_embd": 16, "n_head": 2, "n_layer": 1, "vocab_size": VOCAB}
        if kind == "gpt2"
        else {**SMALL, "head_dim": 4}
    )
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **names))
    before = model.config._attn_implementation
    assert not forward.prepare(model)
    assert model.config._attn_implementation == before


def test_the_head_runs_on_trained_positions_alone():
    """Goal: no logits are made for prompts or padding. Red with the head on every hidden state."""
    model = tiny_model()
    forward.prepare(model)
    model.lm_head.forward = None  # the module itself is never called either
    batch = batch_of()
    ours = forward.token_log_probs(model, batch, with_entropy=False)
    assert len(ours.log_probs_N) == int((batch["loss_mask"] != 0).sum())


def group_batch() -> dict[str, torch.Tensor]:
    """Two prompts, of 5 and 2 tokens, with three answers each, and one prompt of a single token."""
    prompts = [[7, 8, 9, 10, 11], [12, 13], [14]]
    answers = [[3, 4], [5, 6, 7, EOS], [3], [9], [9, 8, 7], [4, EOS], [6, 5]]
    owners = [0, 0, 0, 1, 1, 1, 2]
    width = 9
    ids, seen, trained = [], [], []
    for owner, answer in zip(owners, answers, strict=True):
        prompt = prompts[owner]
        padding = width - len(prompt) - len(answer)
        ids.append([*prompt, *answer, *[EOS] * padding])
        seen.append([1] * (width - padding) + [0] * padding)
        trained.append([0.0] * len(prompt) + [1.0] * len(answer) + [0.0] * padding)
    tokens = torch.tensor(ids)
    return {
        "input_ids": tokens,
        "labels": tokens,
        "attention_mask": torch.tensor(seen),
        "loss_mask": torch.tensor(trained, dtype=torch.float64),
    }


@pytest.mark.parametrize("kind", ["qwen2", "llama", "gemma3_text"])
def test_a_shared_prompt_is_computed_once(kind):
    """Goal: with the prompt of a group in the row once, log-probs and gradients are those of whole documents.

    Red with the last token of a prompt shared too (it predicts several answers), and with positions that run on.
    """
    batch = group_batch()
    whole, shared = model_of(kind), model_of(kind)
    results = []
    for model, share in ((whole, False), (shared, True)):
        forward.prepare(model)
        found = forward.token_log_probs(model, batch, with_entropy=True, share_prompts=share)
        sft_loss(found, batch["labels"], batch["loss_mask"]).backward()
        results.append(found)
    torch.testing.assert_close(results[1].log_probs_N, results[0].log_probs_N, rtol=0, atol=1e-12)
    torch.testing.assert_close(results[1].entropy_N, results[0].entropy_N, rtol=0, atol=1e-12)
    for a, b in zip(whole.parameters(), shared.parameters(), strict=True):
        torch.testing.assert_close(b.grad, a.grad, rtol=1e-5, atol=1e-6)
    packed = forward.pack(batch["input_ids"], batch["attention_mask"], batch["loss_mask"])
    real = batch["attention_mask"].bool()
    assert torch.equal(packed.input_ids[0][packed.rows_BT[real]], batch["input_ids"][real])
    # all of a prompt but its last token, twice
    assert packed.input_ids.shape[1] == int(real.sum()) - 2 * 4 - 2 * 1


def test_bits_do_not_depend_on_who_shares():
    """Goal: in float32 an answer's log-probs are the same bits whichever of its group's answers are in the batch.

    Red with a shared token's attention taken from the first document that has it instead of a document of its own.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    model = model_of("qwen2", torch.float32)
    forward.prepare(model)
    generator = torch.Generator().manual_seed(0)
    prompt = torch.randint(2, VOCAB, (20,), generator=generator).expand(8, -1)
    ids = torch.cat([prompt, torch.randint(2, VOCAB, (8, 30), generator=generator)], 1)
    lengths = torch.arange(22, 50, 4)
    seen = torch.arange(50) < torch.cat([lengths, torch.tensor([50])])[:, None]
    loss_mask = (seen & (torch.arange(50) >= 20)).float()
    batch = {"input_ids": ids, "labels": ids, "attention_mask": seen, "loss_mask": loss_mask}
    try:
        with torch.no_grad():
            together = forward.token_log_probs(model, batch, with_entropy=False, share_prompts=True)
            for rows in ([0, 1, 2, 3], [3, 4], [2, 5, 6], [7, 3]):
                few = {key: value[rows] for key, value in batch.items()}
                found = forward.token_log_probs(model, few, with_entropy=False, share_prompts=True)
                expected = torch.cat(
                    [together.log_probs_N[_row(together.keep, row)] for row in rows]
                )
                assert torch.equal(found.log_probs_N, expected)
    finally:
        torch.set_num_threads(threads)


def _row(keep: torch.Tensor, row: int) -> torch.Tensor:
    """Which of the N trained tokens are the row's."""
    return keep.nonzero()[:, 0] == row
