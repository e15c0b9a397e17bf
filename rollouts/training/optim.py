"""Parameter groups, the optimizers (AdamW; Muon beside AdamW) and the learning-rate schedule. No config objects."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from rollouts.training.optimizer_state import CheckpointError

SCHEDULES = ("constant", "linear", "cosine")
# Of Muon's Newton-Schulz iteration: the quintic of Keller Jordan's Muon, as in nanochat and torch, and its epsilon.
NS_COEFFICIENTS = (3.4445, -4.7750, 2.0315)
NS_EPS = 1e-7
# of matrices that are iterated on together: 256 MiB in bfloat16, and three times that beside it
_NS_ELEMENTS = 2**27


@dataclass(frozen=True)
class MuonSettings:
    """What `build_optimizer(kind="muon")` needs beside AdamW's constants, which are those of its other groups.

    `adjust_lr` is the factor on matrix_lr for a [rows, columns] matrix: "original", sqrt(max(1, rows / columns)), as in
    nanochat, or "match_rms_adamw", 0.2 sqrt(max(rows, columns)): AdamW's rates carry over (arXiv 2502.16982).
    The AdamW groups' rates are multiplied by (hidden_size / width_reference) ** -0.5, 768 in nanochat; None: they stay.
    """

    momentum: float
    nesterov: bool
    ns_steps: int
    adjust_lr: str
    vector_lr: float  # of norms and biases
    width_reference: int | None


def lr_factor(step: int, *, total_steps: int, warmup_frac: float, schedule: str) -> float:
    """Return the factor on every learning rate for optimizer step `step`, counted from 0.

    Rises linearly from 0 over the first `round(warmup_frac * total_steps)` steps, of which the first already moves
    (1/n, not 0). Then "constant" stays at 1; "linear" and "cosine" fall from 1 to reach 0 at `total_steps`.
    """
    if schedule not in SCHEDULES:
        raise ValueError(f"schedule={schedule!r}: needs one of {', '.join(map(repr, SCHEDULES))}")
    warmup_steps = round(warmup_frac * total_steps)
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    if schedule == "constant":
        return 1.0
    progress = min(1.0, (step - warmup_steps) / max(1, total_steps - warmup_steps))
    return 1.0 - progress if schedule == "linear" else 0.5 * (1.0 + math.cos(math.pi * progress))


def parameter_groups(
    model: nn.Module,
    *,
    matrix_lr: float,
    embedding_lr: float,
    unembedding_lr: float,
    weight_decay: float,
) -> list[dict[str, Any]]:
    """Return every trainable parameter exactly once, as torch optimizer groups with a "name": empty ones are left out.

    "matrices", "embeddings" (all `nn.Embedding` weights, and an output head tied to one), "unembedding" (a head of its
    own), and "vectors": norms and biases, which follow `matrix_lr` and are not decayed.
    `model` is a transformers model: `get_input_embeddings()`, `get_output_embeddings()`.
    """
    embeddings = {
        id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)
    }
    embeddings.add(id(model.get_input_embeddings().weight))  # type: ignore[operator]
    head_module = model.get_output_embeddings()  # type: ignore[operator]
    head = None if head_module is None else head_module.weight
    members: dict[str, list[nn.Parameter]] = {
        "matrices": [],
        "embeddings": [],
        "unembedding": [],
        "vectors": [],
    }
    for parameter in model.parameters():  # a tied parameter comes once
        if not parameter.requires_grad:
            continue
        if id(parameter) in embeddings:
            members["embeddings"].append(parameter)
        elif parameter is head:
            members["unembedding"].append(parameter)
        else:
            members["matrices" if parameter.ndim >= 2 else "vectors"].append(parameter)
    rates = {"embeddings": embedding_lr, "unembedding": unembedding_lr}
    return [
        {
            "name": name,
            "params": parameters,
            "lr": rates.get(name, matrix_lr),
            "weight_decay": 0.0 if name == "vectors" else weight_decay,
        }
        for name, parameters in members.items()
        if parameters
    ]


def build_optimizer(
    model: nn.Module,
    *,
    kind: str = "adamw",
    matrix_lr: float,
    embedding_lr: float,
    unembedding_lr: float,
    weight_decay: float,
    beta1: float,
    beta2: float,
    eps: float,
    muon: MuonSettings | None = None,
) -> torch.optim.Optimizer:
    """Return the optimizer over `parameter_groups`; its state has the parameters' dtype, so give it a float32 model.

    "adamw": AdamW for all groups. "muon", with `muon`'s constants: Muon for "matrices", AdamW for the others. The
    result refuses, with CheckpointError, a state that was saved by the other kind or for other groups.
    """
    if kind not in ("adamw", "muon"):
        raise ValueError(f"kind={kind!r}: needs 'adamw' or 'muon'")
    if (kind == "muon") != (muon is not None):
        raise ValueError(
            f"muon={muon!r}: needs MuonSettings with kind='muon', and None with 'adamw'"
        )
    groups = parameter_groups(
        model,
        matrix_lr=matrix_lr,
        embedding_lr=embedding_lr,
        unembedding_lr=unembedding_lr,
        weight_decay=weight_decay,
    )
    if not groups:
        raise ValueError(
            "the model has no parameter with requires_grad=True, so there is nothing to train"
        )
    adamw: dict[str, Any] = {"betas": (beta1, beta2), "eps": eps, "fused": True}
    optimizer: torch.optim.Optimizer
    if muon is None:
        optimizer = torch.optim.AdamW(groups, **adamw)
    else:
        _check_matrices(model)
        optimizer = MuonWithAdamW(*_muon_groups(model, groups, muon), muon=muon, adamw=adamw)
    optimizer.register_load_state_dict_pre_hook(_check_state)
    return optimizer


class BatchedMuon(torch.optim.Muon):
    """`torch.optim.Muon`, on CUDA with all matrices of one shape in one Newton-Schulz iteration.

    Sharded ones (DTensor) and those on a CPU, which gains nothing by it, take it one by one: the same bits as there.
    """

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Take one step. `closure`, if given, is evaluated first; its value is returned."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            alike: dict[Any, list[Tensor]] = {}
            for parameter in group["params"]:
                if parameter.grad is not None:
                    own = None if _together(parameter) else id(parameter)
                    alike.setdefault(
                        (parameter.shape, parameter.dtype, parameter.device, own), []
                    ).append(parameter)
            for (shape, *_), parameters in alike.items():
                count = max(1, _NS_ELEMENTS // shape.numel())
                for start in range(0, len(parameters), count):
                    self._step_alike(group, parameters[start : start + count])
        return loss

    def _step_alike(self, group: Mapping[str, Any], parameters: list[Tensor]) -> None:
        """Move parameters of one shape, dtype and device."""
        for parameter in parameters:
            state = self.state[parameter]
            if "momentum_buffer" not in state:
                state["momentum_buffer"] = torch.zeros_like(
                    parameter, memory_format=torch.preserve_format
                )
        gradients = [cast(Tensor, parameter.grad) for parameter in parameters]
        buffers = [self.state[parameter]["momentum_buffer"] for parameter in parameters]
        torch._foreach_lerp_(buffers, gradients, 1 - group["momentum"])
        updates = (
            torch._foreach_lerp(gradients, buffers, group["momentum"])
            if group["nesterov"]
            else buffers
        )
        constants = group["ns_coefficients"], group["ns_steps"], group["eps"]
        if len(parameters) == 1:
            updates = [orthogonalize(updates[0].bfloat16(), *constants)]
        else:
            updates = orthogonalize(
                torch.stack([update.bfloat16() for update in updates]), *constants
            ).unbind()
        rows, columns = parameters[0].shape
        original = group["adjust_lr_fn"] in (None, "original")
        factor = (
            math.sqrt(max(1, rows / columns)) if original else 0.2 * math.sqrt(max(rows, columns))
        )
        torch._foreach_mul_(parameters, 1 - group["lr"] * group["weight_decay"])
        torch._foreach_add_(parameters, updates, alpha=-group["lr"] * factor)


def _together(parameter: Tensor) -> bool:
    return parameter.device.type == "cuda" and not isinstance(parameter, DTensor)


def orthogonalize(
    matrices: Tensor, coefficients: tuple[float, float, float], steps: int, eps: float
) -> Tensor:
    """Newton-Schulz's nearly orthogonal matrix to one [R, C], or to each of [N, R, C], in their own dtype."""
    a, b, c = coefficients
    is_tall = matrices.shape[-2] > matrices.shape[-1]
    add_product: Callable[..., Tensor] = torch.addmm if matrices.ndim == 2 else torch.baddbmm
    if matrices.ndim == 2:
        norms = matrices.norm()
    else:
        norms = torch.stack(torch._foreach_norm(matrices.unbind()))[:, None, None]
    found = (matrices.mT if is_tall else matrices) / norms.clamp(min=eps)
    for _ in range(steps):
        gram = found @ found.mT
        found = add_product(found, add_product(gram, gram, gram, beta=b, alpha=c), found, beta=a)
    return found.mT if is_tall else found


class MuonWithAdamW(torch.optim.Optimizer):
    """One optimizer made of two: `BatchedMuon` for some parameter groups, `torch.optim.AdamW` for the others.

    The two share this object's `param_groups` (Muon's first) and `state`, so that schedules, checkpoints and hooks see
    one torch optimizer. `muon_groups` or `adamw_groups` may be empty, not both.
    """

    def __init__(
        self,
        muon_groups: Sequence[Mapping[str, Any]],
        adamw_groups: Sequence[Mapping[str, Any]],
        *,
        muon: MuonSettings,
        adamw: Mapping[str, Any],
    ) -> None:
        constants: dict[str, Any] = {
            "momentum": muon.momentum,
            "nesterov": muon.nesterov,
            "ns_steps": muon.ns_steps,
            "adjust_lr_fn": muon.adjust_lr,
            "ns_coefficients": NS_COEFFICIENTS,
            "eps": NS_EPS,
        }
        members: list[torch.optim.Optimizer] = []
        if muon_groups:
            members.append(BatchedMuon([dict(group) for group in muon_groups], **constants))
        if adamw_groups:
            members.append(torch.optim.AdamW([dict(group) for group in adamw_groups], **adamw))
        self._members = members
        super().__init__([group for member in self._members for group in member.param_groups], {})
        self._share()

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Take one step. `closure`, if given, is evaluated first; its value is returned."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for member in self._members:
            member.step()
        return loss

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)  # makes new groups and a new state
        self._share()

    def _share(self) -> None:
        groups = list(self.param_groups)
        for member in self._members:
            member.param_groups = [groups.pop(0) for _ in member.param_groups]
            member.state = self.state


def _muon_groups(
    model: nn.Module, groups: list[dict[str, Any]], muon: MuonSettings
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Return the groups for Muon, and those for AdamW with the rates that they have beside it."""
    width = model.config.get_text_config().hidden_size  # type: ignore[operator, union-attr]
    factor = 1.0 if muon.width_reference is None else (width / muon.width_reference) ** -0.5
    matrices = [group for group in groups if group["name"] == "matrices"]
    others = [group for group in groups if group["name"] != "matrices"]
    for group in others:
        group["lr"] = factor * (muon.vector_lr if group["name"] == "vectors" else group["lr"])
    return matrices, others


def _check_matrices(model: nn.Module) -> None:
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and parameter.ndim > 2:
            raise ValueError(
                f"{name} has shape {tuple(parameter.shape)}: Muon orthogonalizes matrices and has no rule for it; use "
                "kind='adamw' for this model"
            )


def _check_state(optimizer: torch.optim.Optimizer, state_dict: dict[str, Any]) -> None:
    """Refuse a state of another optimizer: torch compares numbers of parameters alone."""

    def kinds(groups: Iterable[Mapping[str, Any]]) -> list[tuple[Any, str]]:
        return [(group.get("name"), "muon" if "momentum" in group else "adamw") for group in groups]

    saved, own = kinds(state_dict["param_groups"]), kinds(optimizer.param_groups)
    if saved != own:
        raise CheckpointError(
            f"the optimizer's state was saved for the parameter groups {_words(saved)}; this run has {_words(own)}. "
            "Resume with the optimizer and the model settings of the first run, or start a new run from its weights."
        )


def _words(kinds: Iterable[tuple[Any, str]]) -> str:
    return ", ".join(f"{name} ({kind})" for name, kind in kinds)
