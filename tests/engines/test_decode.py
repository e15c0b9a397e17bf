"""Decoding inside the process: every kind of architecture served, and what is refused."""

import inspect
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import GPT2LMHeadModel, MambaConfig, MambaForCausalLM

from rollouts.engines.embedded.attention import decode_attention
from rollouts.engines.embedded.batch import BatchRow, PromptJob, RunningBatch
from rollouts.engines.embedded.decode_check import check_decode
from rollouts.engines.embedded.generate_request import PromptRequest, SamplingParams
from rollouts.engines.embedded.sampling import RowFilters, RowSampling, row_keys, sample, uniforms
from rollouts.engines.embedded.served_model import Served, ServedModelError, load, load_weights
from tests.engines.serving import logprobs_of, make_model

torch.set_num_threads(1)


def load_tiny(kind: str, path: Path, *, seed: int = 0) -> Served:
    directory = make_model(kind, path / f"{kind}-{seed}", seed=seed, tokenizer=False)
    return load(str(directory), dtype="float32", device="cpu", trust_remote_code=False)


def decode(
    served: Served, prompts: list[list[int]], *, new_tokens: list[int], rows_max: int
) -> list[BatchRow]:
    """All prompts through one batch, joining as places come free."""
    rows = []
    for index, (prompt, count) in enumerate(zip(prompts, new_tokens, strict=True)):
        params = SamplingParams(ignore_eos=True)
        request = PromptRequest(str(index), tuple(prompt), params, count, True, len(prompt))
        rows.append(BatchRow(PromptJob(request, len, [None]), 0, row_keys(index, 1)[0]))
    with torch.inference_mode():
        batch, waiting = RunningBatch(served, rows_max), list(rows)
        while waiting or batch.rows:
            joining, waiting = waiting[: batch.free], waiting[batch.free :]
            if joining:
                batch.join(joining, "v")
            batch.step()
    return rows


@pytest.mark.parametrize(
    "kind", ["qwen2-tied", "llama", "mistral-sliding", "qwen2-mixed", "gemma", "gpt2"]
)
def test_rows_that_come_and_go_keep_the_models_logprobs(kind: str, tmp_path: Path) -> None:
    """Goal: whatever the attention (sliding, mixed, multi-query, learned positions), rows of all lengths that join and
    leave a small batch have the log-probs of a full forward. Red without the window in `decode_mask` (the sliding
    kinds), and with `move` left out of `leave` (all).
    """
    served = load_tiny(kind, tmp_path)
    rng = np.random.default_rng(0)
    prompts = [rng.integers(2, 32, size=size).tolist() for size in rng.integers(1, 30, size=24)]
    counts = rng.integers(1, 40, size=24).tolist()
    for prompt, count, row in zip(
        prompts, counts, decode(served, prompts, new_tokens=counts, rows_max=7), strict=True
    ):
        assert len(row.output_ids) == count
        assert row.logprobs == pytest.approx(
            logprobs_of(served.model, prompt, row.output_ids, 1.0), abs=1e-5
        )


@pytest.mark.parametrize("name", ["past_key_values", "cache"])
def test_the_cache_by_either_name(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Goal: a model is served whatever its forward pass calls the cache. Red with "past_key_values" alone: transformers
    5.24 renamed it, and every model was refused."""
    forward = GPT2LMHeadModel.forward
    own_name = "cache" if "cache" in inspect.signature(forward).parameters else "past_key_values"

    def renamed(self: Any, **inputs: Any) -> Any:
        return forward(
            self, **{own_name if key == name else key: value for key, value in inputs.items()}
        )

    known = [
        parameter
        for key, parameter in inspect.signature(forward).parameters.items()
        if key != own_name
    ]
    cache = inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None)
    own = [parameter for parameter in known if parameter.kind != inspect.Parameter.VAR_KEYWORD]
    monkeypatch.setattr(renamed, "__signature__", inspect.Signature([*own, cache]), raising=False)
    monkeypatch.setattr(GPT2LMHeadModel, "forward", renamed)
    served = load_tiny("gpt2", tmp_path)
    assert served.cache_argument == name
    (row,) = decode(served, [[3, 4, 5]], new_tokens=[8], rows_max=1)
    monkeypatch.undo()
    assert row.logprobs == pytest.approx(
        logprobs_of(served.model, [3, 4, 5], row.output_ids, 1.0), abs=1e-5
    )


def test_numbers_do_not_depend_on_the_batch(tmp_path: Path) -> None:
    """Goal: on a CPU a row's log-probs are the same bits alone, in a crowd and in a small batch, so that a resumed run
    samples what the first one did. Red with CPU_ROWS_MIN = 1, and with WIDTH_STEP = 1.
    """
    served = load_tiny("llama", tmp_path)
    rng = np.random.default_rng(1)
    prompts = [rng.integers(2, 32, size=size).tolist() for size in rng.integers(1, 60, size=64)]
    crowd = decode(served, prompts, new_tokens=[24] * 64, rows_max=64)
    few = decode(served, prompts, new_tokens=[24] * 64, rows_max=5)
    (alone,) = decode(served, prompts[:1], new_tokens=[24], rows_max=1)
    assert [row.output_ids for row in few] == [row.output_ids for row in crowd]
    assert [row.logprobs for row in few] == [row.logprobs for row in crowd]
    assert alone.logprobs == crowd[0].logprobs


def test_a_recurrent_model_is_refused(tmp_path: Path) -> None:
    """Goal: what the cache cannot hold is said at start, not decoded wrongly. Red without `_cache_argument`."""
    config = MambaConfig(vocab_size=32, hidden_size=32, num_hidden_layers=1)
    MambaForCausalLM(config).save_pretrained(tmp_path)
    with pytest.raises(ServedModelError, match="plain attention only"):
        load(str(tmp_path), dtype="float32", device="cpu", trust_remote_code=False)


def test_decoding_that_is_wrong_is_found_at_start(tmp_path: Path) -> None:
    """Goal: the self-check sees a model whose one-token steps differ from its full forward. Red with the check's
    tolerance at 100.
    """
    served = load_tiny("gpt2", tmp_path)
    forward = served.model.forward

    def forgets_positions(*args: Any, **kwargs: Any) -> Any:
        if kwargs.get("position_ids") is not None and kwargs["position_ids"].shape[-1] == 1:
            kwargs["position_ids"] = torch.zeros_like(kwargs["position_ids"])
        return forward(*args, **kwargs)

    with torch.inference_mode():
        check_decode(served, RunningBatch(served, 1))
        served.model.forward = forgets_positions
        with pytest.raises(ServedModelError, match="log-probs off by"):
            check_decode(served, RunningBatch(served, 1))
        llama = load_tiny("llama", tmp_path)
        assert llama.fast_decode is not None
        llama.fast_decode._sin.neg_()
        with pytest.raises(ServedModelError, match="log-probs off by"):
            check_decode(llama, RunningBatch(llama, 1))


@pytest.mark.parametrize("kind", ["qwen2-tied", "llama", "mistral-sliding", "qwen2-mixed", "qwen3"])
def test_plain_models_decode_without_their_modules_and_keep_their_logprobs(
    kind: str, tmp_path: Path
) -> None:
    """Goal: the fast path runs for the architectures it knows, checks itself at start, and follows weights that are
    replaced in place. Red (the check) with the sign left out of the rotation's sine, and (after the update) with
    `_joined` leaving the parameters where they were.
    """
    served, new = load_tiny(kind, tmp_path), load_tiny(kind, tmp_path, seed=1)
    assert served.fast_decode is not None
    with torch.inference_mode():
        check_decode(served, RunningBatch(served, 1))
    load_weights(served, new.path)
    (row,) = decode(served, [[3, 4, 5]], new_tokens=[20], rows_max=1)
    assert row.logprobs == pytest.approx(
        logprobs_of(new.model, [3, 4, 5], row.output_ids, 1.0), abs=1e-5
    )


# --- weights --------------------------------------------------------------------------------------------------------


def test_weights_are_replaced_with_a_tied_head(tmp_path: Path) -> None:
    """Goal: a tied checkpoint holds one tensor for two; both change. Red with the loop over state skipping lm_head
    and the embedding copied into a new tensor.
    """
    served, new = load_tiny("qwen2-tied", tmp_path), load_tiny("qwen2-tied", tmp_path, seed=1)
    assert not torch.equal(served.model.lm_head.weight, new.model.lm_head.weight)
    load_weights(served, new.path)
    assert torch.equal(served.model.lm_head.weight, new.model.lm_head.weight)
    assert (
        served.model.lm_head.weight.data_ptr() == served.model.model.embed_tokens.weight.data_ptr()
    )


def drop_one(tensors: dict[str, torch.Tensor]) -> None:
    del tensors["model.layers.1.mlp.down_proj.weight"]


def shorten_one(tensors: dict[str, torch.Tensor]) -> None:
    tensors["model.norm.weight"] = tensors["model.norm.weight"][:-1].clone()


@pytest.mark.parametrize("damage", [drop_one, shorten_one, None])
def test_a_bad_checkpoint_changes_nothing(tmp_path: Path, damage: Any) -> None:
    """Goal: a missing tensor, one of another shape or a truncated file leave every old weight in place, and the
    message names the directory. Red (drop_one) with missing keys not looked at: the tensor is then random.
    """
    served = load_tiny("llama", tmp_path)
    before = {name: tensor.clone() for name, tensor in served.model.state_dict().items()}
    bad = make_model("llama", tmp_path / "bad", seed=1, tokenizer=False)
    file = bad / "model.safetensors"
    if damage is None:
        file.write_bytes(file.read_bytes()[:-1000])
    else:
        tensors = load_file(file)
        damage(tensors)
        save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(ServedModelError, match=str(bad)):
        load_weights(served, str(bad))
    assert all(
        torch.equal(before[name], tensor) for name, tensor in served.model.state_dict().items()
    )


def test_another_architecture_is_no_update(tmp_path: Path) -> None:
    """Goal: a loadable checkpoint of another model is refused, naming the first difference."""
    served = load_tiny("llama", tmp_path)
    other = make_model("gpt2", tmp_path / "other", seed=0, tokenizer=False)
    with pytest.raises(ServedModelError, match=r"has no .*differences"):
        load_weights(served, str(other))
    with pytest.raises(ServedModelError, match="no such directory"):
        load_weights(served, str(tmp_path / "nowhere"))


# --- sampling -------------------------------------------------------------------------------------------------------


def test_streams_of_uniforms_are_independent() -> None:
    """Goal: seeds, rows and positions next to each other give unrelated draws. Red with positions added to the key
    without mixing.
    """
    keys = np.concatenate([row_keys(seed, 64) for seed in range(32)])
    draws = np.stack([uniforms(keys, np.full(len(keys), position)) for position in range(64)])
    assert len(np.unique(draws)) > 0.999 * draws.size
    assert abs(draws.mean() - 0.5) < 0.005 and abs(draws.var() - 1 / 12) < 0.005
    for lagged in (
        draws[1:] * draws[:-1],
        draws[:, 1:] * draws[:, :-1],
        draws[:, 64:] * draws[:, :-64],
    ):
        assert abs(lagged.mean() - 0.25) < 0.005
    assert draws.min() > 0 and draws.max() < 1


def test_a_row_is_sampled_alike_with_filtered_neighbours() -> None:
    """Goal: that a batch-mate has top-p changes nothing for the row beside it. Red with the draw in sorted order."""
    logits = torch.randn(512, 40, generator=torch.Generator().manual_seed(0)) * 3
    draws = torch.from_numpy(uniforms(row_keys(0, 512), np.zeros(512, dtype=np.int64)))
    ones = torch.ones(512, 1)
    plain = sample(logits, draws, RowSampling(temperature_B1=ones))
    top_p = ones.clone()
    top_p[::2] = 0.3
    mixed = sample(
        logits,
        draws,
        RowSampling(
            temperature_B1=ones,
            greedy_B=torch.zeros(512, dtype=torch.bool),
            filters=RowFilters(top_k_B1=ones * 40, top_p_B1=top_p, min_p_B1=ones * 0),
        ),
    )
    assert torch.equal(plain[0][1::2], mixed[0][1::2])
    assert not torch.equal(plain[0][::2], mixed[0][::2])


def test_a_token_without_weight_is_never_drawn() -> None:
    """Goal: at either end of (0, 1) the draw lands on a token the filter kept. Red with searchsorted's
    right=False.
    """
    logits = torch.full((3, 6), -torch.inf)
    logits[:, 2:4] = 0.0
    ends = torch.tensor([0.0, 0.5 * 2.0**-32, 1 - 0.5 * 2.0**-32], dtype=torch.float64)
    tokens, logprobs = sample(logits, ends, RowSampling(temperature_B1=torch.ones(3, 1)))
    assert tokens.tolist() == [2, 2, 3]
    assert logprobs.tolist() == pytest.approx([np.log(0.5)] * 3)


# --- attention ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("heads", "group", "size"), [(4, 1, 16), (2, 2, 16), (1, 4, 64), (2, 1, 8)]
)
def test_decode_attention_and_its_bits(heads: int, group: int, size: int) -> None:
    """Goal: one token's attention is torch's own to rounding, and the same bits however wide the cache and however many
    rows. Red with COLUMNS_PER_BLOCK = 1024 (the bits, from 416 columns on), and with PRODUCT_SIZE_MIN = 0 (size 8).
    """
    rows, columns = 40, 704
    generator = torch.Generator().manual_seed(0)
    key, value = (torch.randn(rows, heads, columns, size, generator=generator) for _ in range(2))
    query = torch.randn(rows, heads * group, 1, size, generator=generator)
    module = torch.nn.Module()
    module.num_key_value_groups = group  # type: ignore[assignment]
    for length in (5, 100, 300, 500):
        expected = torch.nn.functional.scaled_dot_product_attention(
            query, key[:, :, :length], value[:, :, :length], enable_gqa=True
        ).transpose(1, 2)
        seen = []
        for width in (-(-length // 32) * 32, 512, columns):
            mask = torch.zeros(rows, 1, 1, width)
            mask[..., length:] = torch.finfo(torch.float32).min
            for count in (16, rows):
                few = (
                    query[:count],
                    key[:count, :, :width],
                    value[:count, :, :width],
                    mask[:count],
                )
                seen.append(decode_attention(module, *few)[0])
        assert torch.allclose(seen[1], expected, rtol=0, atol=1e-5)
        assert all(torch.equal(found[:16], seen[0]) for found in seen)
