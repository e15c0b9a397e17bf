"""Low-rank adapters (LoRA, arXiv 2106.09685) through peft: wrap a model, export it merged, keep the adapter exactly.

The adapters are put into the model's own layers, so it stays the transformers model that it was; its weights are
frozen. What engines get is merged: each matrix plus its adapter's product, as a copy. Nothing is ever merged in place:
adding and subtracting again would drift (slime#780).
"""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn

from rollouts.training.model_loading import ModelError
from rollouts.training.reference import Reference, weights_sha256

ADAPTER_DIR = "adapter"  # inside a checkpoint, in peft's layout; the merged weights stand beside it
ADAPTER_WEIGHTS = "adapter_model.safetensors"
BASE_FILE = "base.json"  # {"name", "sha256"} of the frozen weights
_ADAPTER = "default"  # peft's name for a model's only adapter
_PEFT_PREFIX = "base_model.model."  # of every tensor in peft's files


@dataclass(frozen=True)
class LoraSettings:
    """`target_modules`: names of linear layers ("q_proj"), or "all-linear": all but the output head."""

    rank: int
    alpha: float  # the adapter's output is multiplied by alpha / rank
    dropout: float  # on the adapter's input
    target_modules: str | Sequence[str]
    init_seed: int


def apply_lora(model: nn.Module, settings: LoraSettings, *, base_name: str) -> nn.Module:
    """Freeze `model`, loaded from `base_name`, and put adapters into it; the same module comes back.

    One half of each adapter is drawn from `init_seed`, with the global random state left as found; the other half is 0,
    so that the model's outputs are what they were. Raises ModelError for target modules that the model does not have,
    or that are its embeddings or head: those may be tied, and a product for one would be one for both.
    """
    try:
        from peft import LoraConfig, TaskType, inject_adapter_in_model
    except ImportError as error:
        raise ImportError(
            "LoRA needs peft: pip install 'rollouts[lora]', or set lora=None"
        ) from error
    base = {"name": base_name, "sha256": weights_sha256(model)}
    targets = settings.target_modules
    config = LoraConfig(
        r=settings.rank,
        lora_alpha=settings.alpha,  # type: ignore[arg-type]  # peft multiplies by it; 1.5 is as good as 2
        lora_dropout=settings.dropout,
        target_modules=targets if isinstance(targets, str) else list(targets),
        task_type=TaskType.CAUSAL_LM,
        base_model_name_or_path=base_name,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(settings.init_seed)
        try:
            inject_adapter_in_model(config, model)
        except ValueError as error:
            raise ModelError(
                f"model.lora.target_modules={targets!r} does not fit {base_name}: {error}"
            ) from error
    layers = _layers(model)
    tables = {id(model.get_input_embeddings()), id(model.get_output_embeddings())}  # type: ignore[operator]
    for name, layer in layers.items():
        if id(layer) in tables:
            raise ModelError(
                f"model.lora.target_modules={targets!r}: {name} is the model's embedding or output head; name linear "
                "layers inside the blocks, or set 'all-linear'"
            )
    for parameter_name, parameter in model.named_parameters():
        parameter.requires_grad_(_layer_of(parameter_name, layers, ".lora_") is not None)
    model.lora_base = base  # type: ignore[assignment]
    return model.train()


def is_lora(model: nn.Module) -> bool:
    return hasattr(model, "lora_base")


@torch.no_grad()
def merged_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """Return the plain model's state dict, with adapters merged: new tensors for adapted matrices, the model's own
    otherwise.

    One matrix at a time is merged where the model is, in its dtype, and kept on the CPU.
    """
    parts = merged_parts(model).items()
    return {name: own if (value := make()) is own else value.cpu() for name, (own, make) in parts}


def merged_parts(model: nn.Module) -> dict[str, tuple[Tensor, Callable[[], Tensor]]]:
    """Return the plain model's state dict in parts: by name the model's own tensor (tied ones are one object), and a
    function that makes the value: a new tensor, where the model is, for an adapted matrix, that very tensor
    otherwise."""
    layers = _layers(model)

    def merge(tensor: Tensor, layer: Any) -> Tensor:
        with torch.no_grad():
            return tensor + layer.get_delta_weight(_ADAPTER).to(tensor.dtype)

    def own(tensor: Tensor) -> Tensor:
        return tensor

    parts: dict[str, tuple[Tensor, Callable[[], Tensor]]] = {}
    for key, tensor in model.state_dict(keep_vars=True).items():
        if _layer_of(key, layers, ".lora_"):
            continue
        layer = _layer_of(key, layers, ".base_layer.")
        if layer is not None and key == f"{layer}.base_layer.weight":
            parts[f"{layer}.weight"] = tensor, partial(merge, tensor, layers[layer])
        else:  # as it is: a bias of an adapted layer under its plain name
            parts[key.replace(".base_layer.", ".") if layer else key] = tensor, partial(own, tensor)
    return parts


def adapter_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """Return the adapter's own tensors (not copies), under the names that peft's files have."""
    suffix = f".{_ADAPTER}."
    layers = _layers(model)
    return {
        _PEFT_PREFIX + key.replace(suffix, "."): tensor
        for key, tensor in model.state_dict(keep_vars=True).items()
        if _layer_of(key, layers, ".lora_")
    }


def write_adapter(model: nn.Module, directory: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write the adapter in peft's layout, and which frozen weights it belongs to, into the new directory `directory`.

    `tensors`: `adapter_state_dict`, or a copy of it, whole.
    """
    directory.mkdir()
    config: Any = model.peft_config[_ADAPTER]  # type: ignore[index]
    config.save_pretrained(directory)
    on_cpu = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    safetensors.torch.save_file(on_cpu, directory / ADAPTER_WEIGHTS, metadata={"format": "pt"})
    (directory / BASE_FILE).write_text(json.dumps(base_record(model), indent=1) + "\n")


def base_record(model: nn.Module) -> dict[str, str]:
    """{"name", "sha256"} of the frozen weights under a model's adapters."""
    return dict(model.lora_base)  # type: ignore[arg-type]


@contextmanager
def adapters_off(model: nn.Module) -> Iterator[None]:
    """Inside, `model` computes as its frozen weights alone, in evaluation mode; afterwards everything is as it was."""
    layers, training = _layers(model).values(), model.training
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for layer in layers:
        layer.enable_adapters(False)  # freezes them, too
    model.eval()
    try:
        yield
    finally:
        model.train(training)
        for layer in layers:
            layer.enable_adapters(True)
        for parameter in trained:
            parameter.requires_grad_(True)


def base_as_reference(model: nn.Module) -> Reference:
    """Return the frozen weights under a model's adapters, as the reference of its KL penalty: no second model in
    memory."""
    return Reference(model, **base_record(model), using=adapters_off)


def read_base(checkpoint: Path) -> dict[str, str] | None:
    """Return `base_record` of the model that wrote a checkpoint directory; None for one that was trained without
    LoRA."""
    file = checkpoint / ADAPTER_DIR / BASE_FILE
    return json.loads(file.read_text()) if file.is_file() else None


def _layers(model: nn.Module) -> dict[str, Any]:
    from peft.tuners.lora import LoraLayer

    return {name: module for name, module in model.named_modules() if isinstance(module, LoraLayer)}


def _layer_of(key: str, layers: dict[str, Any], separator: str) -> str | None:
    """Return the adapted layer that the state-dict key belongs to, if what follows its name is `separator`."""
    name, found, _ = key.partition(separator)
    return name if found and name in layers else None
