"""The value model of PPO: a linear head on the policy's last hidden state, with an optimizer of its own.

V(s_t) is read where the token at position t is chosen: from the hidden state of position t - 1. The head is no part of
the language model that engines load; it lives in a checkpoint's training state.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from rollouts.training import distributed


class ValueHead(nn.Module):
    """w · h + b in float32. Both start at 0: the first values are 0, and the first gradient into the policy too.

    `lr` is AdamW's for w and b, without decay; a backend's schedule scales it. Gradients are summed over ranks and
    clipped by themselves, so that a value model that is far off does not slow the policy down.
    """

    def __init__(
        self,
        hidden_size: int,
        *,
        lr: float,
        beta1: float = 0.9,
        beta2: float = 0.95,
        eps: float = 1e-8,
    ) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(hidden_size))
        self.bias = nn.Parameter(torch.zeros(()))
        self.optimizer = torch.optim.AdamW(
            self.parameters(), lr=lr, betas=(beta1, beta2), eps=eps, weight_decay=0.0
        )
        self._lr = lr

    def forward(self, hidden_MD: Tensor) -> Tensor:
        """[M] from hidden states [M, D] of any floating dtype, whatever autocast says."""
        with torch.autocast(hidden_MD.device.type, enabled=False):
            return hidden_MD.to(self.weight.dtype) @ self.weight + self.bias

    def gradient_norm(self) -> Tensor:
        """Sum the gradients over ranks; return their L2 norm, a scalar that nobody has read. Every rank calls it."""
        for parameter in self.parameters():
            if parameter.grad is None:  # no sequence on this rank
                parameter.grad = torch.zeros_like(parameter)
        gradients = [self.weight.grad, self.bias.grad]
        distributed.all_reduce_sum(gradients)  # type: ignore[arg-type]
        return nn.utils.get_total_norm(gradients)  # type: ignore[arg-type]

    def step(self, lr_factor: float, max_grad_norm: float, norm: Tensor) -> None:
        """Clip gradients of this `norm`, which is finite; step, clear."""
        nn.utils.clip_grads_with_norm_(self.parameters(), max_grad_norm, norm)
        for group in self.optimizer.param_groups:
            group["lr"] = self._lr * lr_factor
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def state(self) -> dict[str, Any]:
        """Copies of weights and optimizer state, on the CPU: what an exact resume needs."""
        return _copied({"weights": self.state_dict(), "optimizer": self.optimizer.state_dict()})

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Continue from what `state()` gave; the learning rate stays this one's."""
        self.load_state_dict(state["weights"])
        self.optimizer.load_state_dict(state["optimizer"])


def _copied(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.detach().cpu().clone()
    if isinstance(value, Mapping):
        return {key: _copied(item) for key, item in value.items()}
    return [_copied(item) for item in value] if isinstance(value, list) else value
