"""Rented machines of RunPod, Vast, Lambda and Prime Intellect. Needs `pip install 'rollouts[cloud]'`.

    from rollouts.cloud import GPUClient

No live account was ever used to test it: docs/reference/clouds.md says what that means.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rollouts.cloud.cloud_errors import CloudError
    from rollouts.cloud.gpu_client import AsyncGPUClient, GPUClient
    from rollouts.cloud.machine_types import Address, Machine, MachineNeeds, Offer

_HOMES = {
    "Address": "machine_types",
    "AsyncGPUClient": "gpu_client",
    "CloudError": "cloud_errors",
    "GPUClient": "gpu_client",
    "Machine": "machine_types",
    "Offer": "machine_types",
    "MachineNeeds": "machine_types",
}
__all__ = [
    "Address",
    "AsyncGPUClient",
    "CloudError",
    "GPUClient",
    "Machine",
    "MachineNeeds",
    "Offer",
]


def __getattr__(name: str) -> Any:
    """Import a public name when it is asked for: the ledger is read where httpx is missing."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
