"""The optimizer that a stage's config describes."""

import dataclasses

from torch import nn
from torch.optim import Optimizer

from rollouts.config import MuonConfig, RLConfig, SFTConfig
from rollouts.training.optim import MuonSettings, build_optimizer


def stage_optimizer(model: nn.Module, stage: SFTConfig | RLConfig) -> Optimizer:
    """Return the optimizer of `model`'s trainable parameters."""
    settings = stage.optimizer
    return build_optimizer(
        model,
        kind=settings.kind,
        matrix_lr=stage.matrix_lr * stage.init_lr_frac,
        embedding_lr=stage.embedding_lr * stage.init_lr_frac,
        unembedding_lr=stage.unembedding_lr * stage.init_lr_frac,
        weight_decay=stage.weight_decay,
        beta1=settings.beta1,
        beta2=settings.beta2,
        eps=settings.eps,
        muon=None if settings.muon is None else _muon_settings(settings.muon, stage.init_lr_frac),
    )


def _muon_settings(muon: MuonConfig, init_lr_frac: float) -> MuonSettings:
    constants = dataclasses.asdict(muon)
    constants["vector_lr"] = muon.vector_lr * init_lr_frac
    constants["width_reference"] = None if muon.width_reference == -1 else muon.width_reference
    return MuonSettings(**constants)
