"""How far an installation is, read from what pip and uv really print."""

import itertools
from pathlib import Path

import pytest

from rollouts.run_dir import EnvironmentSpec, RunDir
from rollouts.worker.environments import installer
from rollouts.worker.environments.installer import Progress
from tests.worker.stands import events


@pytest.fixture
def progress(tmp_path: Path) -> Progress:
    spec = EnvironmentSpec(
        name="trainer",
        path=str(tmp_path / "env"),
        installer="pip",
        base_python="python3",
        requirements=[],
        requirements_no_deps=[],
        constraints="",
    )
    return Progress(RunDir(tmp_path / "runs/r"), spec)


PIP = """Collecting torch==2.9.0 (from -r in.txt (line 1))
  Downloading torch-2.9.0-cp311-cp311-manylinux_2_28_x86_64.whl.metadata (30 kB)
  Downloading torch-2.9.0-cp311-cp311-manylinux_2_28_x86_64.whl (899.8 MB)
     ━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━ 899.8/899.8 MB 1.2 MB/s eta 0:00:00
Collecting filelock (from torch==2.9.0)
Processing /srv/wheels/tiny_thing-1.0-py3-none-any.whl
  Downloading cuda-1.2-py3-none-any.whl (1.5 GB)
Installing collected packages: filelock, tiny-thing, torch
"""
UV = """Resolved 3 packages in 1.2s
Downloading torch (196.3MiB)
Downloading numpy (900.5KiB)
 Downloaded torch
Prepared 3 packages in 9.1s
Installed 3 packages in 40ms
"""


@pytest.mark.parametrize(
    ("said", "packages", "downloaded_mb", "doing"),
    [
        (PIP, 3, 0.03 + 899.8 + 1500.0, "installing 3 packages"),
        (UV, 3, 196.3 + 0.9005, "installing 3 packages"),
        (PIP.split("     ━", maxsplit=1)[0], 1, 899.83, "downloading torch-2.9.0 (899.8 MB)"),
        ("Downloading torch (196.3MiB)\n", 0, 196.3, "downloading torch (196.3 MB)"),
        (
            PIP.rpartition("  Downloading")[0],
            3,
            899.83,
            "resolving tiny_thing-1.0-py3-none-any.whl",
        ),
        ("Collecting numpy>=2; python_version > '3'\n", 1, 0.0, "resolving numpy>=2"),
        (
            "  Downloading x-1.whl (12 bytes)\nDownloading (1 MB)\nCollecting\nInstalling collected packages\n",
            0,
            0,
            "starting",
        ),
        ("", 0, 0.0, "starting"),
    ],
    ids=[
        "pip",
        "uv",
        "pip downloads",
        "uv downloads",
        "pip resolves a file",
        "a marker",
        "odd lines",
        "nothing",
    ],
)
def test_progress_is_read(
    progress: Progress, said: str, packages: int, downloaded_mb: float, doing: str
) -> None:
    """Goal: packages, megabytes and what it does come from pip's and uv's own lines, in their units; a line that is
    neither changes nothing. Red with pip's units alone, and with kB taken for MB."""
    for line in said.splitlines():
        progress.read(line)
    assert (progress.packages, progress.doing) == (packages, doing)
    assert progress.downloaded_mb == pytest.approx(downloaded_mb, abs=1e-6)


def test_progress_is_told_now_and_then(
    progress: Progress, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Goal: an event each 10 s at first, later each 30 s, with the bytes that lie in the environment. Red with one for
    each look: ten a second."""
    (tmp_path / "env").mkdir()
    (tmp_path / "env/lib").write_bytes(b"x" * 2_500_000)
    now = [progress._started]
    monkeypatch.setattr(installer.time, "monotonic", lambda: now[0])
    for _ in range(3000):  # 300 s
        now[0] += 0.1
        progress.tell()
    rows = events(progress._run, "environment_progress")
    pauses = [later["seconds"] - row["seconds"] for row, later in itertools.pairwise(rows)]
    assert rows[0]["seconds"] == pytest.approx(10.0, abs=0.2) and rows[0]["installed_mb"] == 2.5
    assert pauses[0] == pytest.approx(10, abs=0.3) and pauses[-1] == pytest.approx(30, abs=0.5)
    assert all(later > pause - 0.3 for pause, later in itertools.pairwise(pauses))
    assert 8 <= len(rows) <= 20 and rows[0]["doing"] == "starting" and rows[0]["name"] == "trainer"
