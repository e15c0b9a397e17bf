"""The optimizer of a stage."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class MuonConfig:
    """Muon, the optimizer of hidden matrices. docs/reference/optimization.md."""

    momentum: float  # of the update's running sum
    nesterov: bool  # look one step ahead with the momentum
    ns_steps: int  # Newton-Schulz iterations
    adjust_lr: Literal[
        "original", "match_rms_adamw"
    ]  # matrix_lr's factor by shape: nanochat's, or to use AdamW's rates
    vector_lr: float  # of norms and biases, by AdamW
    # AdamW groups' rates x (hidden_size / this) ** -0.5, in nanochat 768; -1: unchanged
    width_reference: int


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """The optimizer of a stage; its rates are the stage's."""

    # Muon for matrices, AdamW for embeddings, head, norms and biases; None: AdamW for all
    muon: MuonConfig | None
    beta1: float  # AdamW's: of the first moment
    beta2: float  # of the second moment
    eps: float  # added to the second moment's root
    max_grad_norm: float  # global L2 norm at which gradients are clipped
    warmup_frac: float  # share of the stage's steps over which the rate rises linearly from 0
    schedule: Literal["constant", "linear", "cosine"]  # after warm-up; linear and cosine end at 0

    @property
    def kind(self) -> Literal["adamw", "muon"]:
        return "adamw" if self.muon is None else "muon"
