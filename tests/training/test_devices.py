"""The devices of threads and ranks, with a stand-in for CUDA where it would be called."""

import datetime
import threading
from pathlib import Path

import pytest
import torch

from rollouts.training import devices, distributed, nvidia_driver
from rollouts.training.backends.futures import Worker


@pytest.fixture
def current(monkeypatch: pytest.MonkeyPatch) -> dict[int, torch.device]:
    """Stand-in for torch.cuda.set_device: the current device by thread."""
    by_thread: dict[int, torch.device] = {}
    monkeypatch.setattr(
        torch.cuda, "set_device", lambda device: by_thread.update({threading.get_ident(): device})
    )
    return by_thread


def test_a_backends_thread_has_its_device(current: dict[int, torch.device]) -> None:
    """Goal: work runs where its rank's device is current. Red without the initializer: device 0 in every rank."""
    worker = Worker("backend", torch.device("cuda", 1))
    assert worker.submit("look", lambda: current.get(threading.get_ident())).wait() == torch.device(
        "cuda", 1
    )
    assert threading.get_ident() not in current
    Worker("backend", torch.device("cpu")).submit("look", int).wait()
    assert len(current) == 1


def test_what_a_group_is_made_with() -> None:
    """Goal: NCCL gets its device and minutes; gloo, where ranks wait for rank 0, the stage's limit.

    Red with one limit for both, and without device_id.
    """
    cuda = distributed.group_arguments(torch.device("cuda", 1), 21600.0)
    assert (cuda["backend"], cuda["device_id"]) == ("cpu:gloo,cuda:nccl", torch.device("cuda", 1))
    assert cuda["timeout"] == datetime.timedelta(hours=6)
    assert (
        distributed.nccl_timeout_s(21600.0) <= 1800.0 and distributed.nccl_timeout_s(60.0) == 60.0
    )
    assert distributed.group_arguments(torch.device("cpu"), 60.0) == {
        "backend": "gloo",
        "timeout": datetime.timedelta(seconds=60),
    }


@pytest.mark.parametrize(("seen", "rank"), [(0, 0), (1, 1), (2, 5)])
def test_a_device_that_torch_does_not_see(
    monkeypatch: pytest.MonkeyPatch, seen: int, rank: int
) -> None:
    """Goal: the error names the build, the driver and the device. Red with "torch sees no CUDA device" alone."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: seen > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: seen)
    with pytest.raises(devices.DeviceError) as raised:
        distributed.local_device("cuda", rank)
    for words in (
        f"no CUDA device {rank} here: it sees {seen}",
        f"torch {torch.__version__}",
        "driver",
        "nvidia-smi",
    ):
        assert words in str(raised.value)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (
            "NVRM version: NVIDIA UNIX x86_64 Kernel Module  550.54.15  Tue Mar  5 22:23:56 UTC 2024\n",
            "driver 550.54.15",
        ),
        (
            "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.65.06  Release Build\n",
            "driver 580.65.06",
        ),
        ("something else\n", "unknown version"),
        (None, "no NVIDIA driver loaded"),
    ],
)
def test_the_drivers_version(tmp_path: Path, text: str | None, said: str) -> None:
    """Goal: both wordings of the kernel's module are read. Red with a fixed column."""
    file = tmp_path / "version"
    if text is not None:
        file.write_text(text)
    assert said in nvidia_driver.driver_version(file)
