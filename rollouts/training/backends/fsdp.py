"""The FSDP backend: parameters, gradients and optimizer state sharded over ranks with FSDP2 (`fully_shard`).

Each decoder layer is a unit that is gathered when it runs, and the root another: embeddings, final norm and head, so
that tied weights are one parameter. Master weights, gradients and optimizer state are float32 whatever the model
computes in. Gradients are summed over ranks, as everywhere here. A forward or backward pass is a collective operation:
every rank must run as many as the others (`collective`); the loops see to it, with micro-batches that train on nothing.
"""

import functools
import itertools
import types
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    MixedPrecisionPolicy,
    OffloadPolicy,
    fully_shard,
    register_fsdp_forward_method,
)
from torch.distributed.tensor import DTensor

from rollouts.training import checkpoint, distributed
from rollouts.training.backends.pytorch import PyTorchTrainingBackend
from rollouts.training.compiled_layers import layers_of
from rollouts.training.forward import Layout
from rollouts.training.log_probs import TokenLogProbs
from rollouts.training.rl_losses import Logits

T = TypeVar("T")
__all__ = ["FSDPConfig", "FSDPTrainingBackend"]
STRATEGIES = ("FULL_SHARD", "SHARD_GRAD_OP", "HYBRID_SHARD", "NO_SHARD")
_FORWARD = "training_forward"  # the method of a sharded model that gathers the root's parameters while it runs


@dataclass(frozen=True)
class FSDPConfig:
    """How a model is spread over the ranks.

    `sharding_strategy`: "FULL_SHARD" frees a layer's gathered parameters after it ran, forward and backward;
    "SHARD_GRAD_OP" keeps them from forward to backward (more memory, fewer all-gathers); "HYBRID_SHARD" shards within
    groups of `shard_group_size` ranks (None: those of one node) that each hold a whole copy; "NO_SHARD": a whole copy
    on every rank. `mixed_precision`: compute in bfloat16, reduce gradients in float32. `gradient_checkpointing`: keep
    only each layer's input for the backward pass and compute the rest again. `cpu_offload`: parameters, gradients and
    optimizer state live in host memory, where the optimizer's step runs too.
    """

    sharding_strategy: str = "FULL_SHARD"
    mixed_precision: bool = True
    gradient_checkpointing: bool = False
    cpu_offload: bool = False
    shard_group_size: int | None = None

    def __post_init__(self) -> None:
        if self.sharding_strategy not in STRATEGIES:
            allowed = ", ".join(map(repr, STRATEGIES))
            raise ValueError(f"sharding_strategy={self.sharding_strategy!r}: needs one of {allowed}")
        if self.shard_group_size is not None and self.sharding_strategy != "HYBRID_SHARD":
            raise ValueError(
                f"shard_group_size={self.shard_group_size}: needs None, since only 'HYBRID_SHARD' has groups"
            )


class FSDPTrainingBackend(PyTorchTrainingBackend):
    """`PyTorchTrainingBackend` with the model sharded, a `reference` model too.

    `model` is a float32 transformers model on the CPU, the same on every rank: rank 0's parameters are taken. It is
    sharded in place, a layer at a time, so that no device ever holds the whole of it. `optimizer_fn` is given the
    sharded model, and its state is sharded likewise. `device`: None for this rank's CUDA device where there is one,
    else the CPU. Under torchrun the process group is made here if `distributed.initialize` has not made it.
    Gradients are summed over ranks at each `forward_backward`, whose "grad_norm" is therefore the same on every rank;
    of those that `expect` announced at the last alone: until then each rank holds a whole float32 gradient.
    A loss must be 0, not NaN, for a batch without a trained token where it is given "tokens_global".
    """

    collective = True
    _sharded = True

    def __init__(
        self,
        model: nn.Module,
        optimizer_fn: Callable[[nn.Module], torch.optim.Optimizer],
        loss_fn: Callable[..., Tensor],
        checkpoint_dir: Path | str,
        config: FSDPConfig | None = None,
        *,
        device: torch.device | str | None = None,
        **options: Any,
    ) -> None:
        if "compute_dtype" in options:
            raise ValueError("compute_dtype: an option of PyTorchTrainingBackend; here FSDPConfig.mixed_precision says")
        if options.get("value_head") is not None:
            raise ValueError("value_head: a sharded backend has none; use PyTorchTrainingBackend")
        self._config = config or FSDPConfig()
        device_type = ("cuda" if torch.cuda.is_available() else "cpu") if device is None else torch.device(device).type
        own = distributed.initialize(device_type, alone=True) if not dist.is_initialized() else None
        if device is None:
            device = own or (torch.device("cuda", torch.cuda.current_device()) if device_type == "cuda" else "cpu")
        self.device = torch.device(device)
        reference = options.get("reference")
        if reference is not None and reference.model is model:
            raise ValueError(
                "reference: is the model itself with its adapters off, and those of a sharded model stay as they were "
                "when it first ran; load the reference as a model of its own"
            )
        _check_float32(model)
        self._mesh = _mesh(self._config, self.device.type)
        if self._config.gradient_checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})  # type: ignore[operator]
        self._place(model)
        super().__init__(model, optimizer_fn(model), loss_fn, checkpoint_dir, self.device, **options)

    # --- what differs on the worker thread --------------------------------------------------------------------------

    def _place(self, model: nn.Module) -> None:
        """Shard `model` in place, layer by layer, with rank 0's parameters."""
        if isinstance(model, FSDPModule):
            return
        layers = _layers(model)
        for layer in layers:
            self._shard(layer, is_root=False)
        for unit, after in itertools.pairwise(cast(list[FSDPModule], layers)):
            unit.set_modules_to_forward_prefetch([after])  # gathered while this one runs; backward does so by itself
        self._shard(model, is_root=True)
        for module in _units(model):
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)  # gloo has no other, and a factor of 1 needs none

        def training_forward(module: nn.Module, inputs: Mapping[str, Any], layout: Layout | None) -> Any:
            logits = super(FSDPTrainingBackend, self)._logits(module, inputs, layout)
            if isinstance(logits, Tensor):
                return logits
            return tuple(getattr(logits, field.name) for field in fields(logits))  # FSDP finds tensors in tuples

        setattr(model, _FORWARD, types.MethodType(training_forward, model))
        register_fsdp_forward_method(model, _FORWARD)

    def _shard(self, module: nn.Module, *, is_root: bool) -> None:
        whole = [parameter for parameter in module.parameters() if not isinstance(parameter, DTensor)]
        for parameter in whole:
            parameter.data = parameter.data.to(self.device)
        distributed.broadcast_tensors([parameter.detach() for parameter in whole])
        dtype = torch.bfloat16 if self._config.mixed_precision else torch.float32
        # The root's inputs are a batch, whose masks and log-probs stay as they are
        policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=not is_root)
        on_host = CPUOffloadPolicy(pin_memory=self.device.type == "cuda")
        fully_shard(
            module,
            mesh=self._mesh,
            reshard_after_forward=None if is_root and self._reshards else self._reshards,
            mp_policy=policy,
            offload_policy=on_host if self._config.cpu_offload else OffloadPolicy(),
        )

    @property
    def _reshards(self) -> bool:
        return self._config.sharding_strategy in ("FULL_SHARD", "HYBRID_SHARD")

    def _logits(self, model: nn.Module, inputs: Mapping[str, Any], layout: Layout | None) -> Logits:
        output = getattr(model, _FORWARD)(inputs, layout)
        if not torch.is_grad_enabled():
            _reshard(model)  # no backward pass will
        return output if isinstance(output, Tensor) else TokenLogProbs(*output)

    def _reduce_now(self, *, now: bool) -> None:
        cast(FSDPModule, self.model).set_requires_gradient_sync(now or not self._defers)

    @functools.cached_property
    def _defers(self) -> bool:
        """Whether whole gradients are kept until a step's last micro-batch, and summed over ranks once."""
        if self._config.cpu_offload:
            return False
        whole_bytes = 4 * sum(parameter.numel() for parameter in self._parameters())
        on_cuda = self.device.type == "cuda"
        return defers_reduction(
            whole_bytes, torch.cuda.get_device_properties(self.device).total_memory if on_cuda else None
        )

    def _sum_over_ranks(self, gradients: list[Tensor]) -> None:
        """The backward passes have done it."""

    def _snapshot(self, *arguments: Any) -> checkpoint.Snapshot:
        _reshard(self.model)  # a caller may have run the model: generation leaves the root's parameters gathered
        return super()._snapshot(*arguments)

    def _on_model(self, function: Callable[[nn.Module], T]) -> T:
        _reshard(self.model)
        return super()._on_model(function)

    def _save_weights(self, path: Path, dtype: torch.dtype | None) -> Path:
        _reshard(self.model)
        return super()._save_weights(path, dtype)

    def _load_checkpoint(self, path: Path) -> dict[str, Any]:
        _reshard(self.model)
        return super()._load_checkpoint(path)


def defers_reduction(gradient_bytes: int, device_bytes: int | None) -> bool:
    """Whether a device (None: a CPU) has room for whole float32 gradients beside the shards.

    Kept whole, they are summed over ranks once a step rather than at each micro-batch. They may take 1/16 of the
    memory, less than a memory plan's margin: those of 1.5B parameters on 141 GB, of 0.5B on 40 GB.
    """
    return device_bytes is None or 16 * gradient_bytes <= device_bytes


def _check_float32(model: nn.Module) -> None:
    others = sorted({str(parameter.dtype) for parameter in model.parameters()} - {"torch.float32"})
    if others:
        raise ValueError(
            f"model has parameters in {', '.join(others)}: needs float32, the master weights; load it with "
            "dtype=torch.float32 and let FSDPConfig(mixed_precision=True) compute in bfloat16"
        )


def _mesh(config: FSDPConfig, device_type: str) -> DeviceMesh:
    """The ranks as (copies, shards of a copy), or the shards alone."""
    ranks = dist.get_world_size()
    if config.sharding_strategy in ("FULL_SHARD", "SHARD_GRAD_OP"):
        return init_device_mesh(device_type, (ranks,), mesh_dim_names=("shard",))
    size = 1 if config.sharding_strategy == "NO_SHARD" else config.shard_group_size or distributed.local_world_size()
    if size < 1 or ranks % size:
        raise ValueError(f"shard_group_size={size}: needs a divisor of the {ranks} ranks")
    return init_device_mesh(device_type, (ranks // size, size), mesh_dim_names=("replicate", "shard"))


def _layers(model: nn.Module) -> list[nn.Module]:
    layers = layers_of(model)
    if not layers:
        raise ValueError(
            f"{type(model).__name__} does not say which of its modules are layers (_no_split_modules), so it cannot be "
            "sharded layer by layer"
        )
    return layers


def _units(model: nn.Module) -> list[FSDPModule]:
    return [module for module in model.modules() if isinstance(module, FSDPModule)]


def _reshard(model: nn.Module) -> None:
    for module in _units(model):
        module.reshard()
