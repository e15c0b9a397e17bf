"""Load a tokenizer and a model, from the hub or a directory, with weights or with seeded random ones."""

import logging
from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

if TYPE_CHECKING:
    import torch
    from torch import nn
    from transformers import PreTrainedModel

    from rollouts.training.seams import Tokenizer

logger = logging.getLogger(__name__)
NAMES_SHOWN = 5


class ModelError(ValueError):
    """A model or tokenizer that cannot be loaded. The message names it, what was found, and the fix."""


def load_tokenizer(name: str, *, trust_remote_code: bool = False) -> "Tokenizer":
    """Load the tokenizer of a hub id or directory. Raises ModelError, also where it lacks a vocabulary or end token."""
    from transformers import AutoTokenizer

    require_model(name)
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=trust_remote_code)
    except Exception as error:  # transformers raises a dozen unrelated kinds (HTTP, JSON, its own)
        raise ModelError(_message("tokenizer", name, error, trust_remote_code)) from error
    # transformers makes one up where the files are missing
    if len(tokenizer) <= len(tokenizer.get_added_vocab()):
        raise ModelError(
            f"{name}: its tokenizer lacks a vocabulary: there is no tokenizer.json (or vocab.json, tokenizer.model). "
            "Fix: put the model's own tokenizer files beside its config.json."
        )
    if tokenizer.eos_token_id is None:
        raise ModelError(
            f"tokenizer of {name!r} lacks an eos_token: nothing would end an answer; set it in its config"
        )
    return cast("Tokenizer", tokenizer)


def load_model(
    name: str,
    *,
    init: Literal["pretrained", "random"] = "pretrained",
    init_seed: int = 0,
    dtype: "torch.dtype | None" = None,
    trust_remote_code: bool = False,
) -> "PreTrainedModel":
    """Load a causal language model on the CPU, in training mode. dtype None: float32, the master weights.

    init "random" needs only the architecture (config.json) and draws weights from init_seed: the same every time, with
    the global random state left as found. Raises ModelError.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    require_model(name)
    dtype = torch.float32 if dtype is None else dtype
    try:
        if init == "random":
            config = AutoConfig.from_pretrained(name, trust_remote_code=trust_remote_code)
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(init_seed)
                model = AutoModelForCausalLM.from_config(
                    config, dtype=dtype, trust_remote_code=trust_remote_code
                )
        elif init == "pretrained":
            require_weights(name)
            model = with_every_weight(
                AutoModelForCausalLM, name, dtype=dtype, trust_remote_code=trust_remote_code
            )
        else:
            raise ModelError(f"init={init!r}: needs 'pretrained' or 'random'")
    except ModelError:
        raise
    except Exception as error:  # as above
        raise ModelError(_message("model", name, error, trust_remote_code)) from error
    return model.train()


def with_every_weight(auto_class: Any, name: str, **options: Any) -> "PreTrainedModel":
    """Return `auto_class.from_pretrained(name, **options)`, after checking that the files have each of its tensors.

    transformers draws random values for a tensor that the files lack, and says so in a log alone. Here that is a
    ModelError, and so is a tensor of another shape; a tied one needs only one of its names. Tensors of the files that
    the model lacks are named in a warning, and by `tensors_left_out`.
    """
    model, info = auto_class.from_pretrained(
        name, output_loading_info=True, ignore_mismatched_sizes=True, **options
    )
    missing, unknown = set(info["missing_keys"]), set(info["unexpected_keys"])
    problems = [
        f"{key} has shape {list(found)}, the architecture needs {list(needed)}"
        for key, found, needed in sorted(info["mismatched_keys"])
    ]
    if missing:
        problems.append(f"no tensor for {_some(missing)}")
    if problems or info["error_msgs"]:
        found = f"; found beside: {_some(unknown)}" if unknown else ""
        details = "; ".join([*problems[:NAMES_SHOWN], *info["error_msgs"]])
        raise ModelError(
            f"{name}: the weights are not this model's: {details}{found}. They would be random. Fix: "
            f"{_prefix_fix(missing, unknown)}"
        )
    if unknown:
        model.tensors_left_out = (
            f"{name}: its files hold tensors that the model lacks: {_some(unknown)}"
        )
        logger.warning("%s", model.tensors_left_out)
    return model


def tensors_left_out(model: "nn.Module") -> str:
    """Return a sentence about tensors of the model's files that the model lacks; "" without any."""
    return getattr(model, "tensors_left_out", "")


def _some(names: Collection[str]) -> str:
    """`a, b, c (12 tensors)`: the first few, and how many there are."""
    shown = ", ".join(sorted(names)[:NAMES_SHOWN])
    return f"{shown}, … ({len(names)} tensors)" if len(names) > NAMES_SHOWN else shown


def _prefix_fix(missing: Collection[str], unknown: Collection[str]) -> str:
    """Say what to mend: a prefix that a wrapper left on the names, or else the files as a whole."""
    for key in unknown:
        for wanted in missing:
            if key.endswith(f".{wanted}"):
                prefix = key.removesuffix(wanted)
                return f"the names carry the prefix {prefix!r}: save the model without its wrapper."
    return "save all of the model's weights, or set init='random' to draw new ones."


def enable_activation_checkpointing(model: "PreTrainedModel") -> None:
    """Keep only each layer's input for the backward pass, which computes the rest again: same numbers, less memory.

    Works with frozen weights below trained ones. Raises ModelError for an architecture that lacks support for it.
    """
    if not model.supports_gradient_checkpointing:
        raise ModelError(
            f"{type(model).__name__} lacks activation checkpointing; set activation_checkpointing=False"
        )
    enable = (
        getattr(model, "activation_checkpointing_enable", None)
        or model.gradient_checkpointing_enable
    )  # < 5.20
    enable({"use_reentrant": False})


def require_model(name: str) -> None:
    """Raise ModelError for a name that can only be a directory but does not exist, or one that lacks config.json."""
    path = Path(name)
    if not path.is_dir():
        if path.is_absolute() or name.startswith((".", "~")) or name.count("/") > 1:
            raise ModelError(
                f"{name}: no such directory (looked in {Path.cwd()}), and not a valid hub id"
            )
    elif not (path / "config.json").is_file():
        raise ModelError(
            f"{name}: the directory lacks config.json, so it is not a Hugging Face model"
        )


def require_weights(name: str) -> None:
    """Raise ModelError for a directory without weights."""
    path = Path(name)
    if path.is_dir() and not any(path.glob("*.safetensors")) and not any(path.glob("*.bin")):
        raise ModelError(
            f"{name}: the directory lacks weights (*.safetensors); set init='random' to draw new ones"
        )
    whole = ("model*.safetensors", "pytorch_model*.bin")
    if (path / "adapter_config.json").is_file() and not any(
        found for part in whole for found in path.glob(part)
    ):
        raise ModelError(
            f"{name}: the directory holds an adapter (adapter_config.json) without its model. Fix: merge it into its "
            "base model (peft: merge_and_unload, save_pretrained), or name that one"
        )


def _message(what: str, name: str, error: Exception, trust_remote_code: bool) -> str:
    reason = " ".join(str(error).split())[:600] or type(error).__name__
    if Path(name).is_dir():
        fix = "check the files in that directory"
    else:
        fix = "there is no such directory here, so it was taken for a hub id: check the name, the network and HF_TOKEN"
    if not trust_remote_code and "trust_remote_code" in reason:
        fix = "set trust_remote_code=True if you trust this model's own code"
    return f"cannot load the {what} of {name!r}: {reason}. Fix: {fix}."
