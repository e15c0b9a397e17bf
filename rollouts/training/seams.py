"""Protocols between the parts of a run: tokenizer, batch, training backend, prompts and rollouts.

Whoever takes one of these as an argument may call all of it. The protocol of an engine's client is in `inference`.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypedDict, TypeVar, runtime_checkable

from rollouts.training.types import Prompt, RewardFn, RolloutBatch

if TYPE_CHECKING:  # the protocols themselves work without torch
    import torch
    from torch import Tensor, nn

T = TypeVar("T")
T_co = TypeVar("T_co", covariant=True)


class Tokenizer(Protocol):
    """A tokenizer, as rendering, sampling and checkpoints use it. Those of transformers meet it."""

    name_or_path: str
    is_fast: bool  # whether it can tell the position of each token in the text
    eos_token_id: int | None
    pad_token_id: int | None
    all_special_ids: list[int]
    added_tokens_decoder: Mapping[int, Any]
    special_tokens_map: Mapping[str, Any]

    def __call__(self, text: str | list[str], **options: Any) -> Mapping[str, Any]:
        """ "input_ids" of a text, or of each; with return_offsets_mapping "offset_mapping" too."""

    def decode(self, token_ids: Sequence[int], **options: Any) -> str: ...

    def batch_decode(self, sequences: Sequence[Sequence[int]], **options: Any) -> list[str]: ...

    def apply_chat_template(self, conversation: Sequence[Mapping[str, Any]], **options: Any) -> Any:
        """Return a conversation as text, or as ids with tokenize=True."""

    def get_chat_template(self, *, tools: Any = None) -> str: ...

    def convert_ids_to_tokens(self, ids: Sequence[int]) -> list[str]: ...

    def save_pretrained(self, save_directory: Any) -> Any: ...


class Batch(TypedDict, total=False):
    """A training step's sequences, or a micro-batch of them: B sequences, T tokens of the longest.

    The first three are always there. The others are there where the loss, or the loop, needs them. A loss of a user's
    own may name further keys: what is in a batch reaches it under its name.
    """

    input_ids: "Tensor"  # [B, T]
    labels: "Tensor"  # [B, T]: the token at each position itself; losses do the shift
    loss_mask: "Tensor"  # [B, T]: 0 for tokens that are not trained on
    attention_mask: "Tensor"  # [B, T]: 0 for padding, on either side; left out: nothing is padded
    rewards: "Tensor"  # [B]: for advantages from a value head
    advantages: "Tensor"  # [B] or [B, T]
    old_log_probs: "Tensor"  # [B, T]: the sampler's
    ref_log_probs: "Tensor"  # [B, T]: the frozen reference's
    returns: "Tensor"  # [B, T]: targets of the value head
    old_values: "Tensor"  # [B, T]: its estimates before the step
    tokens_global: float  # trained tokens of the whole step, over all micro-batches and ranks
    sequences_global: float  # likewise sequences
    temperature: float  # the sampler's
    clip_range: float | tuple[float, float]


class TrainFuture(Protocol[T_co]):
    """Work that a backend has accepted. asyncio and trio alike."""

    async def result(self) -> T_co:
        """Wait until the work is applied and return its value, or raise what it raised."""

    def done(self) -> bool:
        """Return whether `result` would return at once."""


class MinimalBackend(Protocol):
    """The least that a training loop runs on. `backends.minimal.complete` fills in the rest of `TrainingBackend`.

    Work is applied in the order it was submitted; several pieces may be in flight. Every rank makes each call.
    """

    def forward_backward(self, batch: Batch) -> TrainFuture[dict[str, float]]:
        """Add a micro-batch's gradient: {"loss", "grad_norm", ...}. The losses of a step's micro-batches add up."""

    def optim_step(self) -> TrainFuture[dict[str, float]]:
        """Apply the gradients summed over micro-batches and ranks: {"lr", "step", ...}."""

    async def save_checkpoint(
        self, step: int, metrics: dict[str, Any], extra: dict[str, Any] | None = None
    ) -> Path:
        """Write a checkpoint that resumes exactly, with `extra` (plain data) beside it, and return its directory."""

    async def load_checkpoint(self, path: Path) -> dict[str, Any]:
        """Continue from a checkpoint: return its metadata, with "step", "metrics" and "extra"."""


@runtime_checkable
class TrainingBackend(MinimalBackend, Protocol):
    """All that loops, weight updates and evaluation ask of the model and its optimizer."""

    @property
    def model(self) -> "nn.Module":
        """The model that is trained."""

    @property
    def device(self) -> "torch.device":
        """This rank's."""

    @property
    def checkpoint_dir(self) -> Path: ...

    @property
    def step(self) -> int:
        """Optimizer steps applied."""

    @property
    def collective(self) -> bool:
        """Whether every rank must run as many forward passes as the others, as sharded models do."""

    @property
    def has_log_probs(self) -> bool:
        """Whether `log_probs` works. Without it, no weight update can be proven."""

    def expect(self, micro_batches: int) -> None:
        """Announce how many `forward_backward` make up the next optimizer step; they may then return nothing."""

    def forward(self, batch: Batch) -> TrainFuture[dict[str, float]]:
        """{"loss", "tokens"} of `batch` on this rank, without a gradient and with dropout off."""

    def log_probs(self, batch: Batch) -> "TrainFuture[Tensor]":
        """Log-probs [B, T] of the tokens that the loss mask marks, on the CPU; 0 elsewhere."""

    def trained_log_probs(self) -> "TrainFuture[list[Tensor]]":
        """Log-probs [B, T] of the trained tokens of each micro-batch of the last update, as its loss had them.

        On the CPU, 0 elsewhere, in the order of `forward_backward`; [] where they were not kept.
        """

    def values(self, batch: Batch) -> "TrainFuture[Tensor]":
        """Return the value head's estimates [B, T] of the state before each trained token, on the CPU; 0 elsewhere."""

    def on_model(self, function: "Callable[[nn.Module], T]") -> TrainFuture[T]:
        """Call `function(model)` in turn with other work; every rank calls it."""

    def computing(self) -> AbstractContextManager[None]:
        """Let the caller run the model itself, computing as in training; no work may be in flight."""

    def give_cache_back(self) -> TrainFuture[None]:
        """Return unused device memory, in turn with other work."""

    async def start_checkpoint(
        self, step: int, metrics: dict[str, Any], extra: dict[str, Any] | None = None
    ) -> TrainFuture[Path]:
        """Save the state after all work submitted before, while later work goes on.

        Returns once that state is copied; result() waits until the checkpoint is complete.
        """

    async def save_weights(self, path: Path, dtype: "torch.dtype | None" = None) -> Path:
        """Write the weights alone, as an engine loads them, to the directory `path`. `dtype` None: as they are."""

    def close(self) -> None:
        """Wait for the checkpoint that is being written, if any."""


class PromptSource(Protocol):
    """Prompts in an order that a saved position continues exactly: `datasets.data_buffer.DataBuffer`."""

    def get_prompts(self, count: int) -> list[Prompt]:
        """Return the next `count` prompts."""

    def save_state(self) -> dict[str, Any]:
        """Return the position, as plain data."""

    def load_state(self, state: dict[str, Any]) -> None:
        """Continue with exactly the prompts that would have come."""


class RolloutManager(Protocol):
    """Makes a batch of rollouts when asked: `AsyncRolloutManager`, or a user's own."""

    async def generate_batch(self, *, reward_fn: RewardFn | None = None) -> RolloutBatch:
        """Return the groups of one optimizer step; `reward_fn` replaces the manager's own."""


class RolloutSource(Protocol):
    """The rollouts that the RL loop trains on, sampled or saved. Rank 0 alone has one."""

    async def next_batch(self) -> RolloutBatch:
        """Return the batch of the next step."""

    def updating(self, version: int) -> AbstractAsyncContextManager[None]:
        """Return a context around an update of the engines' weights to those after step `version`.

        Entering it waits for the rollouts that must finish under the old weights.
        """

    def save_state(self) -> dict[str, Any]:
        """Return what a resumed run needs to continue with the same batches, as plain data."""

    def load_state(self, state: dict[str, Any]) -> None:
        """Continue from what `save_state` returned."""
