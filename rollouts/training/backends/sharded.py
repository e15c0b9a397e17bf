"""Parameters, gradients and optimizer state sharded over ranks with FSDP2 (`fully_shard`).

Each decoder layer is a unit that is gathered when it runs, and the root another: embeddings, final norm and head, so
that tied weights are one parameter. Master weights, gradients and optimizer state are float32 whatever the model
computes in. Gradients are summed over ranks, as everywhere here.
"""

import itertools
import types
from dataclasses import dataclass, fields
from typing import Any, cast

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

from rollouts.training import distributed
from rollouts.training.backends.placement import Compute
from rollouts.training.compiled_layers import layers_of
from rollouts.training.forward import Layout
from rollouts.training.log_probs import TokenLogProbs
from rollouts.training.seams import Batch
from rollouts.training.token_selection import Logits

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
            raise ValueError(
                f"sharding_strategy={self.sharding_strategy!r}: needs one of {allowed}"
            )
        if self.shard_group_size is not None and self.sharding_strategy != "HYBRID_SHARD":
            raise ValueError(
                f"shard_group_size={self.shard_group_size}: needs None, since only 'HYBRID_SHARD' has groups"
            )

    @property
    def reshards(self) -> bool:
        """Whether a layer's gathered parameters are freed as soon as it has run."""
        return self.sharding_strategy in ("FULL_SHARD", "HYBRID_SHARD")


class Sharded:
    """`Placement` by FSDP2. It needs a process group, of one rank at least."""

    collective = True

    def __init__(self, config: FSDPConfig, device: torch.device) -> None:
        self.device = device
        self.config = config
        self._mesh = _mesh(config, device.type)

    def place(self, model: nn.Module) -> None:
        """Shard `model` in place, layer by layer, with rank 0's parameters; one that is sharded stays as it is."""
        if isinstance(model, FSDPModule):
            return
        layers = _layers(model)
        for layer in layers:
            self._shard(layer, is_root=False)
        for unit, after in itertools.pairwise(cast(list[FSDPModule], layers)):
            # gathered while this one runs; backward does so by itself
            unit.set_modules_to_forward_prefetch([after])
        self._shard(model, is_root=True)
        for module in _units(model):
            module.set_gradient_divide_factor(1.0)
            # gloo has no other, and a factor of 1 needs none
            module.set_force_sum_reduction_for_comms(True)
        setattr(model, _FORWARD, types.MethodType(_training_forward, model))
        register_fsdp_forward_method(model, _FORWARD)

    def run(
        self, compute: Compute, model: nn.Module, inputs: Batch, layout: Layout | None
    ) -> Logits:
        output = getattr(model, _FORWARD)(compute, inputs, layout)
        if not torch.is_grad_enabled():
            self.at_rest(model)  # no backward pass will
        return output if isinstance(output, Tensor) else TokenLogProbs(*output)

    def reduce_now(self, model: nn.Module, *, now: bool) -> None:
        cast(FSDPModule, model).set_requires_gradient_sync(now or not self._defers(model))

    def sum_gradients(self, gradients: list[Tensor]) -> None:
        """Do nothing: the backward passes have done it."""

    def at_rest(self, model: nn.Module) -> None:
        for module in _units(model):
            module.reshard()

    def _shard(self, module: nn.Module, *, is_root: bool) -> None:
        whole = [
            parameter for parameter in module.parameters() if not isinstance(parameter, DTensor)
        ]
        for parameter in whole:
            parameter.data = parameter.data.to(self.device)
        distributed.broadcast_tensors([parameter.detach() for parameter in whole])
        dtype = torch.bfloat16 if self.config.mixed_precision else torch.float32
        # The root's inputs are a batch, whose masks and log-probs stay as they are
        policy = MixedPrecisionPolicy(
            param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=not is_root
        )
        on_host = CPUOffloadPolicy(pin_memory=self.device.type == "cuda")
        reshards = self.config.reshards
        fully_shard(
            module,
            mesh=self._mesh,
            reshard_after_forward=None if is_root and reshards else reshards,
            mp_policy=policy,
            offload_policy=on_host if self.config.cpu_offload else OffloadPolicy(),
        )

    def _defers(self, model: nn.Module) -> bool:
        """Return whether whole gradients are kept until a step's last micro-batch, and summed over ranks once."""
        if self.config.cpu_offload:
            return False
        whole_bytes = 4 * sum(
            parameter.numel() for parameter in model.parameters() if parameter.requires_grad
        )
        on_cuda = self.device.type == "cuda"
        return defers_reduction(
            whole_bytes,
            torch.cuda.get_device_properties(self.device).total_memory if on_cuda else None,
        )


def defers_reduction(gradient_bytes: int, device_bytes: int | None) -> bool:
    """Return whether a device (None: a CPU) has room for whole float32 gradients beside the shards.

    Kept whole, they are summed over ranks once a step rather than at each micro-batch. They may take 1/16 of the
    memory, less than a memory plan's margin: those of 1.5B parameters on 141 GB, of 0.5B on 40 GB.
    """
    return device_bytes is None or 16 * gradient_bytes <= device_bytes


def _training_forward(
    model: nn.Module, compute: Compute, inputs: Batch, layout: Layout | None
) -> Any:
    logits = compute(model, inputs, layout)
    if isinstance(logits, Tensor):
        return logits
    # FSDP finds tensors in tuples
    return tuple(getattr(logits, field.name) for field in fields(logits))


def _mesh(config: FSDPConfig, device_type: str) -> DeviceMesh:
    """Return the ranks as (copies, shards of a copy), or the shards alone."""
    ranks = dist.get_world_size()
    if config.sharding_strategy in ("FULL_SHARD", "SHARD_GRAD_OP"):
        return init_device_mesh(device_type, (ranks,), mesh_dim_names=("shard",))
    size = (
        1
        if config.sharding_strategy == "NO_SHARD"
        else config.shard_group_size or distributed.local_world_size()
    )
    if size < 1 or ranks % size:
        raise ValueError(f"shard_group_size={size}: needs a divisor of the {ranks} ranks")
    return init_device_mesh(
        device_type, (ranks // size, size), mesh_dim_names=("replicate", "shard")
    )


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
