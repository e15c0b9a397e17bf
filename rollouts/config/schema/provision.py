"""Which machine to rent for a run, for how much, and what becomes of it."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class ProvisionConfig:
    """A machine that `deploy CONFIG` rents for the run: docs/reference/clouds.md."""

    providers: list[
        Literal["runpod", "vast", "lambda", "prime", "sky"]
    ]  # where to look; of equal prices the earlier one's is taken
    gpu_types: list[str]  # parts of names, in any case: ["H100"]; []: any that has the memory
    gpu_memory_gb_min: float  # of each GPU
    gpus: int  # of the machine, all on one
    regions: list[str]  # parts of names, in any case; []: any
    spot: bool  # machines too that may be taken away at any moment
    disk_gib: int  # of the machine; providers that bill for it have it in their price
    # a container image, in the provider's words; None: the provider's own with CUDA
    image: str | None
    price_per_hour_max: float  # US dollars, of the whole machine
    hours_max: float  # the guard ends a machine so long after its creation, whatever the run does; each anew
    spend_max: float  # US dollars: likewise, once the price of all hours of all machines of the run comes to that
    # likewise, after so long without a live run, a copy and GPU use; None: never
    idle_minutes_max: float | None
    allow_unguarded: bool  # False: where a guard cannot be armed, nothing is rented
    # USER@HOST where `deploy guard --stay` runs, to hold it too; None: this computer alone
    guard_host: str | None
    ready_timeout_s: float  # from a machine's creation to its first SSH login; it is ended, and the next offer tried
    # how many further offers are tried after one that has no capacity or proves bad
    retries_max: int
    # how often a run whose machine its provider takes goes on on the next offer, from its last checkpoint
    resumes_max: int
    when_done: Literal["end", "keep"]  # after the last verified pull; keep: until the guard's time
