"""Load a Hugging Face directory into a served model, and new weights into one that is running.

B rows, K cache columns, T tokens, V vocabulary. Log-probs are natural logs, fp32.
"""

import inspect
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
import transformers
from safetensors import SafetensorError
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, PreTrainedModel

from rollouts.engines.embedded import attention
from rollouts.engines.embedded.fast_decode import FastDecode
from rollouts.training.model_loading import ModelError as WeightsError
from rollouts.training.model_loading import with_every_weight
from rollouts.training.seams import Tokenizer

DTYPES: Mapping[str, torch.dtype] = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}
_SERVED_LAYER_TYPES = {"full_attention", "sliding_attention"}


class ServedModelError(Exception):
    """A model directory that cannot be served. One line: the path, what is wrong, what is needed."""


@dataclass(frozen=True)
class Served:
    """A loaded model and what the server needs to know about it."""

    model: PreTrainedModel  # in eval mode, on `device`
    tokenizer: Tokenizer | None  # None where the directory has none
    path: str
    device: torch.device
    dtype: torch.dtype
    context_length: int
    vocab_size: int
    eos_ids: frozenset[int]
    trust_remote_code: bool
    cache_argument: str  # how the forward pass calls its cache: "past_key_values", "cache" from transformers 5.24 on
    fast_decode: FastDecode | None  # for running rows, in place of the model's own forward pass

    def encode(self, text: str) -> list[int]:
        assert self.tokenizer is not None
        return list(self.tokenizer(text)["input_ids"])

    def decode(self, ids: list[int], skip_special_tokens: bool) -> str:
        assert self.tokenizer is not None
        return str(self.tokenizer.decode(ids, skip_special_tokens=skip_special_tokens))

    def decode_mask(self, lengths_B: torch.Tensor, width: int) -> Any:
        """Return additive masks for one new token per row, in the shape that the model's forward takes.

        lengths_B [B]: the column of each row's new token; columns 0 to lengths_B[b] are its own, of `width` K.
        The result is [B, 1, 1, K], or a dict of such by layer type where the config has layer types
        (as `transformers.masking_utils.create_masks_for_generate` does).
        """
        text_config = self.model.config.get_text_config()
        window: int | None = getattr(text_config, "sliding_window", None)
        layer_types = getattr(text_config, "layer_types", None)
        columns_K = torch.arange(width, device=self.device)
        hidden_BK = columns_K > lengths_B[:, None]
        if not layer_types:
            if window is not None:
                hidden_BK = hidden_BK | (columns_K <= lengths_B[:, None] - window)
            return self._additive(hidden_BK)
        masks = {"full_attention": self._additive(hidden_BK)}
        if "sliding_attention" in layer_types:
            assert window is not None
            outside_BK = columns_K <= lengths_B[:, None] - window
            masks["sliding_attention"] = self._additive(hidden_BK | outside_BK)
        return {kind: mask for kind, mask in masks.items() if kind in layer_types}

    def _additive(self, hidden_BK: torch.Tensor) -> torch.Tensor:
        mask_BK = torch.zeros(hidden_BK.shape, dtype=self.dtype, device=self.device)
        return mask_BK.masked_fill_(hidden_BK, torch.finfo(self.dtype).min)[:, None, None, :]

    @torch.inference_mode()
    def input_logprobs(self, ids: tuple[int, ...]) -> list[float]:
        """Return [T-1] the log-prob of each prompt token but the first, at temperature 1, as SGLang reports them."""
        ids_T = torch.tensor([ids], device=self.device)
        logits_TV = self.model(input_ids=ids_T, use_cache=False).logits[0, :-1].float()
        chosen_T1 = logits_TV.log_softmax(dim=-1).gather(1, ids_T[0, 1:, None])
        return [float(value) for value in chosen_T1[:, 0].tolist()]


def load(path: str, *, dtype: str, device: str, trust_remote_code: bool) -> Served:
    """Load the model in `path`, ready to serve. Raises ServedModelError."""
    transformers.utils.logging.disable_progress_bar()
    where = torch.device(device)
    if where.type == "cuda" and not torch.cuda.is_available():
        raise ServedModelError(
            "--device cuda: torch sees no CUDA device here; use --device cpu, or check the driver"
        )
    model = _read(path, DTYPES[dtype], trust_remote_code)
    cache_argument = _cache_argument(model, path)
    if where.type == "cpu":
        attention.use_for(model)
    text_config = model.config.get_text_config()
    tokenizer = _tokenizer(path, trust_remote_code)
    model.to(where).eval()  # type: ignore[arg-type]  # transformers' wrapper hides the signature
    return Served(
        model=model,
        tokenizer=tokenizer,
        path=path,
        device=where,
        dtype=DTYPES[dtype],
        context_length=int(text_config.max_position_embeddings),
        vocab_size=int(text_config.vocab_size),
        eos_ids=_eos_ids(model, path, tokenizer),
        trust_remote_code=trust_remote_code,
        cache_argument=cache_argument,
        fast_decode=FastDecode.from_model(model),
    )


def load_weights(served: Served, path: str) -> None:
    """Replace the served weights, in place, by those of the checkpoint directory `path`. All or nothing.

    Everything that can be wrong with the files is found before the first tensor is written. Raises ServedModelError.
    """
    state = served.model.state_dict()
    new_state = (
        _read_plain(path, served.model)
        or _read(path, served.dtype, served.trust_remote_code).state_dict()
    )
    problems = [f"has no {name}" for name in state if name not in new_state]
    problems += [
        f"has {name}, which the served model lacks" for name in new_state if name not in state
    ]
    problems += [
        f"{name} has shape {list(new_state[name].shape)}, the served model {list(tensor.shape)}"
        for name, tensor in state.items()
        if name in new_state and new_state[name].shape != tensor.shape
    ]
    if problems:
        raise ServedModelError(
            f"{path}: {problems[0]}"
            + (f" ({len(problems)} differences)" if len(problems) > 1 else "")
        )
    with torch.no_grad():
        for name, tensor in state.items():
            tensor.copy_(new_state[name])


def _read_plain(path: str, model: PreTrainedModel) -> dict[str, torch.Tensor] | None:
    """Return the state of `model` as the one safetensors file of `path` holds it; None where there is more to it.

    Building a model to read a checkpoint takes twelve times as long as reading a small one. What does not fit name by
    name and shape by shape (shards, converted names, damage) is left to `_read`, which says what is wrong.
    """
    # tied tensors are one tensor with several names; the file has it once
    names: dict[int, list[str]] = {}
    state = model.state_dict()
    for name, tensor in state.items():
        names.setdefault(tensor.data_ptr(), []).append(name)
    try:
        stored = load_file(Path(path) / "model.safetensors")
    except (OSError, SafetensorError):
        return None
    known = {
        name: tensor
        for name, tensor in stored.items()
        if name in state and tensor.shape == state[name].shape
    }
    found = {
        alias: tensor for name, tensor in known.items() for alias in names[state[name].data_ptr()]
    }
    return (
        found if len(known) == len(stored) == len(names) and found.keys() == state.keys() else None
    )


def _read(path: str, dtype: torch.dtype, trust_remote_code: bool) -> PreTrainedModel:
    """Return the model in the directory `path`, on the CPU. Raises ServedModelError, also for a missing tensor."""
    if not Path(path).is_dir():
        raise ServedModelError(
            f"{path}: no such directory; needs a Hugging Face directory with config.json and weights"
        )
    try:
        return with_every_weight(
            AutoModelForCausalLM,
            path,
            dtype=dtype,
            trust_remote_code=trust_remote_code,
            local_files_only=True,
        )
    except WeightsError as error:
        raise ServedModelError(str(error)) from error
    except Exception as error:
        # from_pretrained raises many kinds for bad files; the caller needs one line
        raise ServedModelError(f"{path}: cannot be loaded: {_first_line(error)}") from error


def _cache_argument(model: PreTrainedModel, path: str) -> str:
    """Return the name of the cache's argument. Raises ServedModelError for an architecture that is not served."""
    accepted = inspect.signature(model.forward).parameters
    cache = "cache" if "cache" in accepted else "past_key_values"
    lacking = [name for name in (cache, "position_ids", "attention_mask") if name not in accepted]
    text_config = model.config.get_text_config()
    layer_types = set(getattr(text_config, "layer_types", None) or ()) - _SERVED_LAYER_TYPES
    if lacking or layer_types or not hasattr(text_config, "max_position_embeddings"):
        found = (
            f"layers of type {sorted(layer_types)}"
            if layer_types
            else f"a forward without {lacking or 'positions'}"
        )
        raise ServedModelError(
            f"{path}: {type(model).__name__} has {found}; the embedded engine serves plain attention only"
        )
    return cache


def _tokenizer(path: str, trust_remote_code: bool) -> Tokenizer | None:
    names = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json")
    if not any((Path(path) / name).is_file() for name in names):
        return None
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            path, trust_remote_code=trust_remote_code, local_files_only=True
        )
    except Exception as error:  # as above: one line, whatever is wrong with the files
        raise ServedModelError(
            f"{path}: the tokenizer cannot be loaded: {_first_line(error)}"
        ) from error
    return cast(Tokenizer, tokenizer)


def _eos_ids(model: PreTrainedModel, path: str, tokenizer: Tokenizer | None) -> frozenset[int]:
    """Return every id that ends a sequence, of the configs and the tokenizer together, as SGLang does.

    A chat template's own end is in the generation config of our checkpoints, and in our requests' stop_token_ids.
    """
    configs = [model.config, model.config.get_text_config()]
    found = [getattr(one, "eos_token_id", None) for one in (*configs, tokenizer)]
    if os.path.isfile(os.path.join(path, "generation_config.json")):
        found.append(GenerationConfig.from_pretrained(path).eos_token_id)
    ids: set[int] = set()
    for value in found:
        ids.update(value if isinstance(value, list) else [] if value is None else [value])
    return frozenset(ids)


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
