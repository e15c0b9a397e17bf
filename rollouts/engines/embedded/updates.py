"""The served weights: their path and version, and what replaces them. Model thread alone."""

import torch
from transformers import PreTrainedModel

from rollouts.engines.embedded.batch import RunningBatch
from rollouts.engines.embedded.mailbox import CommandRefused
from rollouts.engines.embedded.served_model import Served, ServedModelError, load_weights

DEFAULT_VERSION = "default"  # what SGLang calls the weights that it started with
NamedTensors = list[tuple[str, torch.Tensor]]


class WeightUpdates:
    """Replaces weights in place, whole from a directory or tensor by tensor within a session.

    Each method raises CommandRefused for an update that fails. `load` and `copy` return the message for the caller and
    the number of rows that are in the batch meanwhile.
    """

    def __init__(self, served: Served, batch: RunningBatch) -> None:
        self.path = served.path
        self.version = DEFAULT_VERSION
        self._served = served
        self._batch = batch
        self._session: UpdateSession | None = None

    def load(self, path: str, *, version: str | None, flush_cache: bool) -> tuple[str, int]:
        """Load the checkpoint directory `path`. After a failure the old weights are still complete."""
        try:
            with torch.inference_mode(False):
                load_weights(self._served, path)
        except ServedModelError as error:
            raise CommandRefused(
                f"Failed to update weights: {error}. The old weights serve on."
            ) from error
        self.path = path
        return self._updated(version, flush_cache)

    def begin(self) -> None:
        """Open a session for `copy`."""
        if self._session is not None:
            raise CommandRefused(
                "a weight-update session is already open; call end_weight_update first"
            )
        self._session = UpdateSession(self._served.model)

    def copy(
        self, named: NamedTensors, *, version: str | None, flush_cache: bool
    ) -> tuple[str, int]:
        """Copy tensors into the model, within a session. Tensors copied before a failure stay."""
        if self._session is None:
            raise CommandRefused(
                "tensors are taken only between begin_weight_update and end_weight_update"
            )
        try:
            with torch.inference_mode(False):
                self._session.load(named)
        except ServedModelError as error:
            raise CommandRefused(
                f"Failed to update weights: {error}. What came before it stays."
            ) from error
        return self._updated(version, flush_cache)

    def end(self) -> None:
        """Close the session. Refused when some of the model's tensors were not sent."""
        if self._session is None:
            raise CommandRefused("no weight-update session is open; call begin_weight_update first")
        session, self._session = self._session, None
        try:
            session.finish()
        except ServedModelError as error:
            raise CommandRefused(f"The weights are incomplete: {error}.") from error

    def set_version(self, version: str) -> None:
        """Name the weights; running rows note from which token on."""
        self.version = version
        self._batch.note_version(version)

    def _updated(self, version: str | None, flush_cache: bool) -> tuple[str, int]:
        message = "Succeeded to update model weights."
        if version is not None:
            self.set_version(version)
            message += f" Weight version updated to {version}."
        if flush_cache and not self._batch.flush():
            raise CommandRefused(
                "The weights were updated, but the cache was not flushed: requests are running in it."
            )
        return message, len(self._batch.rows)


class UpdateSession:
    """Copies tensors of `model` as they arrive from the sender's memory. As with SGLang, a failure undoes nothing."""

    def __init__(self, model: PreTrainedModel) -> None:
        self._state: dict[str, torch.Tensor] = model.state_dict()
        # by memory: tied tensors have several names and are sent once
        self._loaded: set[int] = set()

    def load(self, named: NamedTensors) -> None:
        """Copy these over the model's. Raises ServedModelError before the first copy when one of them does not fit."""
        for name, tensor in named:
            own = self._state.get(name)
            if own is None:
                raise ServedModelError(f"the served model has no {name}")
            if own.shape != tensor.shape:
                raise ServedModelError(
                    f"{name} has shape {list(tensor.shape)}, the served model {list(own.shape)}"
                )
        with torch.no_grad():
            for name, tensor in named:
                self._state[name].copy_(tensor)
                self._loaded.add(self._state[name].data_ptr())
        if any(tensor.is_cuda for _, tensor in named):
            torch.cuda.synchronize()  # the sender may write its next bucket once it has the answer

    def finish(self) -> None:
        """Raise ServedModelError naming a tensor that was not sent. A session without any tensor was given up: fine."""
        missing = [
            name for name, tensor in self._state.items() if tensor.data_ptr() not in self._loaded
        ]
        if self._loaded and missing:
            raise ServedModelError(f"{missing[0]} was not sent ({len(missing)} tensors missing)")
