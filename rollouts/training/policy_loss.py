"""The RL loss of a policy, composed: a policy term, the share of each token, and what is added to it.

    loss = sum over trained tokens of share x (policy term + KL penalty - entropy bonus), + the value model's loss

Each part is a frozen dataclass of the numbers that it has. B sequences, T tokens, N trained tokens, all of one
optimizer step; log-probs are natural logs. What each part computes, with its source: docs/reference/losses.md.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, Protocol, TypedDict, Unpack

from torch import Tensor

from rollouts.training.log_probs import TokenLogProbs
from rollouts.training.loss_terms import (
    ClipRange,
    check_choice,
    clamped_exp,
    clipped_surrogate,
    importance_weights,
    k1,
    k2,
    k3,
    ratio_bounds,
    sequence_mean,
    token_shares,
    value_loss,
)
from rollouts.training.token_selection import Logits, aligned, chosen, per_token, select

KL_KINDS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"k1": k1, "k2": k2, "k3": k3}


class PolicyInputs(TypedDict, total=False):
    """What a batch may hold for the loss, beside labels, mask and advantages. [B, T] values are aligned to tokens."""

    old_log_probs: Tensor | None  # [B, T]: the sampler's, at `temperature`
    ref_log_probs: Tensor | None  # [B, T]: a frozen reference model's, likewise
    returns: Tensor | None  # [B, T]: what the value model should have said
    old_values: Tensor | None  # [B, T]: what it said before the step
    # trained tokens of the whole optimizer step; None: this batch is the whole step
    tokens_global: float | None
    sequences_global: float | None  # likewise sequences
    temperature: float  # the sampler's, which divides the logits


class PolicyTerm(Protocol):
    """The term of each token that makes good samples more likely: [N], to be minimised."""

    def __call__(self, step: "Selected") -> Tensor: ...


@dataclass(frozen=True)
class Selected:
    """The trained tokens of a batch, as a policy term reads them."""

    tokens: TokenLogProbs
    advantages_N: Tensor
    mask_BT: Tensor
    old_log_probs_BT: Tensor | None

    def log_ratio_N(self, needed_by: str) -> Tensor:
        """Return log p - log p_old of each token."""
        old_N = aligned(
            "old_log_probs", self.old_log_probs_BT, self.tokens, needed_by=f"loss={needed_by!r}"
        )
        return self.tokens.log_probs_N - old_N


@dataclass(frozen=True)
class PolicyGradient:
    """-A log p: the gradient of a step on samples of the policy itself. GRPO, where nothing is clipped."""

    def __call__(self, step: Selected) -> Tensor:
        return -step.advantages_N * step.tokens.log_probs_N


@dataclass(frozen=True)
class WeightedGradient:
    """-w A log p, with `importance_weights` of `kind` as w: corrects for a sampler whose log-probs differ."""

    kind: str
    cap: float = 2.0

    def __call__(self, step: Selected) -> Tensor:
        tokens = step.tokens
        weights_N = importance_weights(
            step.log_ratio_N("grpo"), tokens.keep, self.kind, self.cap, tokens.places
        )
        return -weights_N * step.advantages_N * tokens.log_probs_N


@dataclass(frozen=True)
class ClippedRatio:
    """`clipped_surrogate` of each token's ratio p / p_old: PPO."""

    clip_range: ClipRange = 0.2
    dual_clip: float | None = None

    def __call__(self, step: Selected) -> Tensor:
        ratio_N = clamped_exp(step.log_ratio_N("ppo"))
        return -clipped_surrogate(ratio_N, step.advantages_N, self.clip_range, self.dual_clip)


@dataclass(frozen=True)
class ClippedSequenceRatio:
    """The same of the sequence's ratio, the geometric mean of its tokens': GSPO."""

    clip_range: ClipRange = 0.2
    dual_clip: float | None = None

    def __call__(self, step: Selected) -> Tensor:
        tokens = step.tokens
        mean_N = sequence_mean(
            step.log_ratio_N("gspo"), tokens.keep, step.mask_BT[:, 1:], tokens.places
        )
        return -clipped_surrogate(
            clamped_exp(mean_N), step.advantages_N, self.clip_range, self.dual_clip
        )


@dataclass(frozen=True)
class ClippedWeight:
    """-clip(ratio) A log p, with no gradient through the clipped ratio: CISPO."""

    clip_range: ClipRange = 0.2

    def __call__(self, step: Selected) -> Tensor:
        weights_N = (
            clamped_exp(step.log_ratio_N("cispo")).clamp(*ratio_bounds(self.clip_range)).detach()
        )
        return -weights_N * step.advantages_N * step.tokens.log_probs_N


@dataclass(frozen=True)
class Shares:
    """How much each token counts: see `token_shares`."""

    aggregation: str = "token_mean"
    length_norm: float | None = None

    def __call__(
        self, mask_BT: Tensor, *, tokens_global: float | None, sequences_global: float | None
    ) -> Tensor:
        return token_shares(
            mask_BT,
            self.aggregation,
            tokens_global=tokens_global,
            sequences_global=sequences_global,
            length_norm=self.length_norm,
        )


@dataclass(frozen=True)
class KLPenalty:
    """`coef` times an estimate of KL(p || reference): `k1`, `k2` or `k3`."""

    coef: float
    kind: str = "k3"

    def __call__(self, tokens: TokenLogProbs, ref_log_probs_BT: Tensor | None) -> Tensor:
        check_choice("kl_kind", self.kind, KL_KINDS)
        ref_N = aligned("ref_log_probs", ref_log_probs_BT, tokens, needed_by=f"kl_coef={self.coef}")
        return self.coef * KL_KINDS[self.kind](tokens.log_probs_N, ref_N)


@dataclass(frozen=True)
class ValueTerm:
    """`coef` times `value_loss` of the value head's values towards the returns, held near the old ones by `clip`."""

    coef: float
    clip: float | None = None

    def __call__(
        self, tokens: TokenLogProbs, returns_BT: Tensor | None, old_values_BT: Tensor | None
    ) -> Tensor:
        if tokens.values_N is None:
            raise ValueError(
                "value_coef: needs values, of a backend with a value head; these logits have none"
            )
        dtype = tokens.values_N.dtype
        returns_N = aligned("returns", returns_BT, tokens, needed_by="value_coef", dtype=dtype)
        old_N = None
        if self.clip is not None:
            old_N = aligned(
                "old_values", old_values_BT, tokens, needed_by="value_clip", dtype=dtype
            )
        return value_loss(tokens.values_N, returns_N, old_N, self.clip)


@dataclass(frozen=True)
class RLLoss:
    """A loss of logits and a batch: a scalar, so that the losses of a step's micro-batches add up.

    `kl`, `value` None: without. Raises ValueError for shapes that do not fit, or an input that a part needs and the
    batch lacks.
    """

    policy: PolicyTerm
    shares: Shares = Shares()
    kl: KLPenalty | None = None
    entropy_coef: float = 0.0
    value: ValueTerm | None = None

    reads_log_probs: ClassVar[bool] = True

    def __call__(
        self,
        logits: Logits,
        labels: Tensor,
        loss_mask: Tensor,
        advantages: Tensor,
        **inputs: Unpack[PolicyInputs],
    ) -> Tensor:
        """`advantages` [B], one per sequence, or [B, T], one per token; the others as in `rl_losses`."""
        unknown = sorted(set(inputs) - set(PolicyInputs.__annotations__))
        if unknown:
            raise TypeError(f"RLLoss: takes no {', '.join(unknown)}")
        temperature, tokens_global = inputs.get("temperature", 1.0), inputs.get("tokens_global")
        tokens = select(logits, labels, loss_mask, temperature, with_entropy=self.entropy_coef != 0)
        mask_BT = loss_mask.to(tokens.log_probs_N.dtype)
        step = Selected(tokens, per_token(advantages, tokens), mask_BT, inputs.get("old_log_probs"))
        terms_N = self.policy(step)
        if self.kl is not None:
            terms_N = terms_N + self.kl(tokens, inputs.get("ref_log_probs"))
        if self.entropy_coef:
            assert tokens.entropy_N is not None
            terms_N = terms_N - self.entropy_coef * tokens.entropy_N
        sequences_global = inputs.get("sequences_global")
        shares_BT = self.shares(
            mask_BT, tokens_global=tokens_global, sequences_global=sequences_global
        )
        loss = (chosen(shares_BT, tokens) * terms_N).sum()
        if self.value is None:
            return loss
        values_N = self.value(tokens, inputs.get("returns"), inputs.get("old_values"))
        mean_BT = token_shares(mask_BT, tokens_global=tokens_global)
        return loss + self.value.coef * (chosen(mean_BT, tokens) * values_N).sum()
