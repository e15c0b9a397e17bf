"""Hub data sets through the real client: fetched, streamed, cached, and read again with the hub out of reach.

In processes of their own: the client reads the hub's address and its offline switch when it is imported.
"""

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from tests.training.datasets.hub import write_hub_dataset
from tests.training.datasets.hub_server import serve_hub

TRAIN = [{"question": f"q{index}", "answer": f"#### {index}"} for index in range(8)]
READ = """
import json, sys
from rollouts.data_formats.row import DataError
from rollouts.training.datasets.rows import read_rows
from rollouts.training.datasets.selection import Selection
for name, split, streaming, count in json.loads(sys.argv[1]):
    try:
        rows = read_rows(name, subset="main", split=split, streaming=streaming, selection=Selection(max_samples=count))
        print(json.dumps([[row.where, row.values] for row in rows]))
    except DataError as error:
        print(json.dumps(str(error)))
"""


def read(home: Path, *calls: tuple[str, str, bool, int], **env: str) -> list[Any]:
    """What `read_rows` gave, or said, for each call, in one fresh process."""
    environment = {
        **os.environ,
        "HF_HOME": str(home),
        "HF_HUB_DISABLE_XET": "1",
        "OMP_NUM_THREADS": "1",
        **env,
    }
    for name in ("HF_TOKEN", "HF_HUB_OFFLINE", "HF_DATASETS_CACHE"):
        environment.pop(name, None)
    command = [sys.executable, "-c", READ, json.dumps(calls)]
    done = subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=200, check=False
    )
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("hub")
    write_hub_dataset(
        root / "openai" / "gsm8k", {"main": {"train": TRAIN, "test": TRAIN[:1]}}, shards=4
    )
    return root


def test_fetched_streamed_and_read_again_without_the_hub(hub: Path, tmp_path: Path) -> None:
    """Goal: "gsm8k" is the hub's data set; streaming three of eight rows fetches the two shards that hold them (the
    others once, when all is fetched); what was fetched is there with HF_DATASETS_OFFLINE=1, and no request is made.

    Red without the alias, with `streaming` not handed on (all four shards), and with an empty cache (below).
    """
    rows = [[f"gsm8k[train] row {index}", row] for index, row in enumerate(TRAIN)]
    with serve_hub(hub) as (address, asked):
        calls = [
            ("gsm8k", "train", True, 3),
            ("gsm8k", "train", False, -1),
            ("gsm8k", "dev", False, -1),
        ]
        streamed, whole, unknown = read(tmp_path, *calls, HF_ENDPOINT=address)
        assert streamed == rows[:3] and whole == rows
        fetched = Counter(path.rsplit("/", 1)[1] for path in asked if path.startswith("GET"))
        assert [fetched[f"train-0000{shard}-of-00004.parquet"] > 1 for shard in range(4)] == [
            True,
            True,
            False,
            False,
        ]
        assert unknown.startswith(
            "gsm8k: cannot read split 'dev', subset 'main' of this hub data set"
        )
        asked.clear()
        assert read(
            tmp_path, ("gsm8k", "train", False, 2), HF_ENDPOINT=address, HF_DATASETS_OFFLINE="1"
        ) == [rows[:2]]
        assert asked == []


def test_a_hub_data_set_that_cannot_be_had_is_named(hub: Path, tmp_path: Path) -> None:
    """Goal: name, cause and fix, for a name that the hub does not have and for a host without the hub.

    Red when the client's own exceptions came through.
    """
    with serve_hub(hub) as (address, _):
        (missing,) = read(tmp_path, ("openai/gsm9k", "train", False, -1), HF_ENDPOINT=address)
    assert "openai/gsm9k: cannot read split 'train', subset 'main' of this hub data set" in missing
    assert "doesn't exist on the Hub" in missing and "HF_TOKEN" in missing
    (offline,) = read(tmp_path, ("gsm8k", "train", False, -1), HF_DATASETS_OFFLINE="1")
    assert (
        "Fix: fetch it once without HF_DATASETS_OFFLINE and HF_HUB_OFFLINE, or name a local directory."
        in offline
    )
