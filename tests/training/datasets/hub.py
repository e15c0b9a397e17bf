"""Data sets on disk as the hub lays them out: cards, split files, parquet shards."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet

Rows = Sequence[Mapping[str, Any]]


def write_jsonl(path: Path, rows: Sequence[Any]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def write_parquet(directory: Path, split: str, rows: Rows, shards: int = 1) -> list[Path]:
    """`train-00000-of-00002.parquet` and so on; the rows in order over the shards."""
    directory.mkdir(parents=True, exist_ok=True)
    shards = min(shards, len(rows))
    size = -(-len(rows) // shards)
    files = []
    for shard in range(shards):
        files.append(directory / f"{split}-{shard:05d}-of-{shards:05d}.parquet")
        own = list(rows[shard * size : (shard + 1) * size])
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(own), files[-1])
    return files


def write_card(root: Path, configs: Mapping[str, Mapping[str, str]]) -> None:
    """README.md with the configurations' splits and their file patterns: {"main": {"train": "main/train-*"}}."""
    lines = ["---", "configs:"]
    for name, splits in configs.items():
        lines += [f"- config_name: {name}", "  data_files:"]
        for split, pattern in splits.items():
            lines += [f"  - split: {split}", f"    path: {pattern}"]
    root.mkdir(parents=True, exist_ok=True)
    (root / "README.md").write_text("\n".join([*lines, "---", "# A data set", ""]))


def write_hub_dataset(
    root: Path, subsets: Mapping[str, Mapping[str, Rows]], shards: int = 1
) -> Path:
    """Parquet under a directory per subset and a card that names them, as openai/gsm8k and allenai/ai2_arc are."""
    for subset, splits in subsets.items():
        for split, rows in splits.items():
            write_parquet(root / subset, split, rows, shards)
    write_card(
        root,
        {
            subset: {split: f"{subset}/{split}-*" for split in splits}
            for subset, splits in subsets.items()
        },
    )
    return root
