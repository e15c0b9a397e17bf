"""The model that a stage trains, the frozen reference beside it, and the value model."""

import dataclasses
from pathlib import Path

from transformers import PreTrainedModel

from rollouts.config import Config, ModelConfig, ValueModel
from rollouts.training.checkpoint import CheckpointError, read_metadata
from rollouts.training.compiled_layers import compile_layers
from rollouts.training.lora import (
    LoraSettings,
    apply_lora,
    base_as_reference,
    base_record,
    is_lora,
    read_base,
)
from rollouts.training.model_loading import enable_activation_checkpointing, load_model
from rollouts.training.reference import Reference, load_reference
from rollouts.training.value_head import ValueHead
from rollouts.worker.builders import StageName


def base_model(config: Config, model_path: str, *, resumes: bool) -> str:
    """Return where this stage's weights come from before its checkpoint is loaded.

    A checkpoint of a LoRA run holds merged weights: it is loaded over the frozen ones, which it names.
    """
    base = read_base(Path(model_path)) if resumes and config.model.lora is not None else None
    return model_path if base is None else base["name"]


def build_model(model: ModelConfig, path: str) -> PreTrainedModel:
    """Load the model at `path` onto the CPU, with the adapters and layers that the config asks for."""
    init = model.init if path == model.name else "pretrained"
    built = load_model(
        path, init=init, init_seed=model.init_seed, trust_remote_code=model.trust_remote_code
    )
    if model.lora is not None:
        apply_lora(built, LoraSettings(**dataclasses.asdict(model.lora)), base_name=path)
    if model.activation_checkpointing:
        enable_activation_checkpointing(built)
    if model.compile:
        compile_layers(built)
    return built


def reference_name(
    config: Config, stage: StageName, model_path: str, *, resumes: bool
) -> str | None:
    """Return where the frozen model of the KL penalty is loaded from; None without one.

    A resumed run keeps the reference it began with, which its checkpoint names: never the checkpoint itself.
    Raises CheckpointError for a checkpoint that was trained without one, where the config names none either.
    """
    rl = config.rl
    if stage != "rl" or rl is None or rl.kl is None:
        return None
    if rl.kl.reference is not None:
        return rl.kl.reference
    if not resumes:
        return model_path
    recorded = read_metadata(Path(model_path)).get("reference")
    if recorded is None:
        raise CheckpointError(
            f"{model_path}: was trained without a KL reference, and rl.kl.coef={rl.kl.coef} needs one: set "
            "rl.kl.reference to the model that run started from, or rl.kl=None"
        )
    return recorded["name"]


def build_reference(config: Config, model: PreTrainedModel, name: str) -> Reference:
    """Return the frozen model of the KL penalty: `model`'s own frozen weights if these are it, with LoRA; else loaded.

    A sharded model cannot be its own reference: its adapters cannot be turned off and on.
    """
    if config.target.sharding == "none" and is_lora(model) and base_record(model)["name"] == name:
        return base_as_reference(model)
    return load_reference(name, trust_remote_code=config.model.trust_remote_code)


def build_value_head(config: Config, stage: StageName, model: PreTrainedModel) -> ValueHead | None:
    """Return the value model that rl.baseline asks for; None without."""
    rl = config.rl
    if stage != "rl" or rl is None or not isinstance(rl.baseline, ValueModel):
        return None
    optimizer = rl.optimizer
    width = model.config.get_text_config().hidden_size
    return ValueHead(
        width, lr=rl.baseline.lr, beta1=optimizer.beta1, beta2=optimizer.beta2, eps=optimizer.eps
    )
