"""Weights for engines of other hosts: each loads the copy that its host was sent."""

from pathlib import Path
from typing import Any

import anyio
import pytest

from rollouts.engines.keys import ADMIN_KEY_VARIABLE
from rollouts.training.inference.adapted_engine import as_client
from rollouts.training.inference.http import WeightSyncError
from rollouts.training.weights.deliver.disk import DiskDelivery
from rollouts.training.weights.deliver.far_copies import FarCopies
from tests.engines.test_receive_model import KEYS, Receiver, receiver
from tests.weights.deliveries import backend_over, change

__all__ = ["receiver"]


class Reader:
    """An engine that keeps what it is told to load."""

    def __init__(self, base_url: str) -> None:
        self.base_url, self.paths, self.weights = base_url, list[str](), list[bytes]()

    async def update_weights_from_checkpoint(self, checkpoint_path: str) -> dict[str, Any]:
        self.paths.append(checkpoint_path)
        self.weights.append((Path(checkpoint_path) / "model.safetensors").read_bytes())
        return {"success": True}


def test_each_host_has_its_copy(
    models: dict[str, Path], tmp_path: Path, receiver: Receiver
) -> None:
    """Goal: an engine of another host loads what was sent there, one of this host what was written here; both are the
    same bytes, and of the versions there the newest stays. Red with the path of this host for both, and with
    `keep_only` left out."""
    backend = backend_over(models["old"], tmp_path)
    near, far = Reader("http://10.0.0.4:30180"), Reader("http://127.0.0.1:30180")
    copies = FarCopies([receiver.url], key=KEYS[ADMIN_KEY_VARIABLE])
    delivery = DiskDelivery(backend, tmp_path / "weights", temporary=True, far=copies)
    for version in (1, 2):
        change(backend, seed=version)
        anyio.run(delivery.deliver, [as_client(near), as_client(far)], str(version))
    names = ["version_000001", "version_000002"]
    assert near.paths == [str(tmp_path / "weights" / name) for name in names]
    assert far.paths == [str(receiver.versions / name) for name in names]
    assert near.weights == far.weights and far.weights[0] != far.weights[1]
    assert [path.name for path in receiver.versions.iterdir()] == names[1:]
    anyio.run(delivery.restore, as_client(far), "2")  # it was started again
    assert far.paths[-1] == far.paths[-2]


def test_a_host_that_refuses(models: dict[str, Path], tmp_path: Path, receiver: Receiver) -> None:
    """Goal: weights that do not reach a host are an error before any engine loads them."""
    far = Reader("http://127.0.0.1:30180")
    copies = FarCopies([receiver.url], key="another key")
    delivery = DiskDelivery(backend_over(models["old"], tmp_path), tmp_path / "w", far=copies)
    with pytest.raises(WeightSyncError, match=r"did not reach another host: .*needs the run's key"):
        anyio.run(delivery.deliver, [as_client(far)], "1")
    assert far.paths == []
