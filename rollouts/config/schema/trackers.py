"""Experiment trackers that a run is fed into while it goes on. Keys come from the environment: none is a field here."""

from dataclasses import dataclass
from typing import ClassVar, Literal


@dataclass(frozen=True, kw_only=True)
class _Tracker:
    """What every tracker has. docs/reference/trackers.md: what each gets, and where it goes."""

    project: str  # the project that the run appears in; of MLflow the experiment


@dataclass(frozen=True, kw_only=True)
class Wandb(_Tracker):
    """Weights & Biases; its key is WANDB_API_KEY, of host.secrets."""

    kind: ClassVar[Literal["wandb"]] = "wandb"

    offline: bool  # True: files in the run's wandb/, for `wandb sync`, without key and network


@dataclass(frozen=True, kw_only=True)
class Trackio(_Tracker):
    """Trackio, in files of the host."""

    kind: ClassVar[Literal["trackio"]] = "trackio"

    directory: str | None  # on the host; None: where Trackio keeps its projects


@dataclass(frozen=True, kw_only=True)
class Mlflow(_Tracker):
    """MLflow: a server, or files of the host. MLFLOW_TRACKING_TOKEN and the like come from host.secrets."""

    kind: ClassVar[Literal["mlflow"]] = "mlflow"

    # a server's address, without a password; None: files in the host's ~/.rollouts/trackers/mlflow
    tracking_uri: str | None


@dataclass(frozen=True, kw_only=True)
class TensorBoard(_Tracker):
    """Files for `tensorboard --logdir`."""

    kind: ClassVar[Literal["tensorboard"]] = "tensorboard"

    directory: str | None  # on the host; None: its ~/.rollouts/trackers/tensorboard


TrackerConfig = Wandb | Trackio | Mlflow | TensorBoard
