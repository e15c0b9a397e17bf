"""Checkpoints in memory that are written again in place."""

from pathlib import Path
from typing import Any

import anyio
import pytest
import torch
from safetensors.torch import load_file

from rollouts.training.inference.adapted_engine import as_client
from rollouts.training.weights.deliver.disk import DiskDelivery
from tests.weights.deliveries import backend_over, change


class Reader:
    """An engine that keeps what it finds in the directory."""

    def __init__(self) -> None:
        self.found: list[dict[str, torch.Tensor]] = []
        self.inodes: list[int] = []

    async def update_weights_from_checkpoint(self, checkpoint_path: str) -> dict[str, Any]:
        file = Path(checkpoint_path) / "model.safetensors"
        self.found.append({name: tensor.clone() for name, tensor in load_file(file).items()})
        self.inodes.append(file.stat().st_ino)
        return {"success": True}


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_two_checkpoints_take_turns(
    models: dict[str, Path], tmp_path: Path, dtype: torch.dtype | None
) -> None:
    """Goal: from the third sync on no new file is made, each holds the weights of its own sync in the dtype asked for,
    and the version before is never touched while it is the standing one. Red with the standing one written over.
    """
    backend, engine = backend_over(models["old"], tmp_path), Reader()
    delivery = DiskDelivery(backend, tmp_path / "weights", dtype=dtype, temporary=True)
    expected = []
    for version in range(5):
        change(backend, seed=version)
        anyio.run(delivery.deliver, [as_client(engine)], str(version))
        state = backend.model.state_dict()
        expected.append(
            {name: state[name].to(dtype or torch.float32).clone() for name in engine.found[-1]}
        )
        visible = [path.name for path in (tmp_path / "weights").glob("version_*")]
        assert visible == [f"version_{version:06d}"]
    assert all(
        torch.equal(a[name], b[name])
        for a, b in zip(engine.found, expected, strict=True)
        for name in a
    )
    first, second, *later = engine.inodes
    assert first != second and later == [first, second, first]
    anyio.run(delivery.aclose, [engine])
    assert not (tmp_path / "weights").exists()
