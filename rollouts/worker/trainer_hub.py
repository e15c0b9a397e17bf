"""Download a model into this host's cache of the hub, so that no engine's time limit counts it.

    <trainer's environment>/bin/python -m rollouts.worker.trainer_hub Qwen/Qwen2.5-0.5B-Instruct [--no-weights]

Takes what a trainer or an engine reads: configuration, tokenizer, code, and one format of weights. What lies in the
cache already is not downloaded again; with HF_HUB_OFFLINE nothing is asked. Prints its progress as installers do.
"""

import argparse
import json
import sys
from collections.abc import Iterable
from fnmatch import fnmatch
from pathlib import Path

from huggingface_hub import (
    HfApi,
    constants,
    errors,
    hf_hub_download,
    snapshot_download,
    try_to_load_from_cache,
)
from huggingface_hub.utils import disable_progress_bars

SMALL = ("*.json", "*.txt", "*.model", "*.jinja", "*.tiktoken", "*.py")
WEIGHTS = ("*.safetensors", "*.bin")  # the first of them that a model has
NOT_WEIGHTS = ("training_args.bin", "optimizer.bin", "scheduler.bin")


class HubError(Exception):
    """The model cannot be downloaded, and the cache lacks it. The message names the fix."""


def wanted(files: Iterable[str], *, weights: bool) -> list[str]:
    """Choose a model's files: those at its root, without weights of a second format."""
    names = [name for name in files if "/" not in name and name not in NOT_WEIGHTS]
    chosen = [name for name in names if any(fnmatch(name, pattern) for pattern in SMALL)]
    for pattern in WEIGHTS if weights else ():
        if found := [name for name in names if fnmatch(name, pattern)]:
            return [*chosen, *found]
    return chosen


def fetch(name: str, *, weights: bool) -> None:
    """Download what the cache lacks of the model. Raises HubError."""
    if constants.HF_HUB_DISABLE_PROGRESS_BARS is None:  # the environment may ask for them
        disable_progress_bars()
    if constants.HF_HUB_OFFLINE:
        _require_cached(name, weights=weights)
        return
    try:
        found = HfApi().model_info(name, files_metadata=True)
        sizes = {file.rfilename: (file.size or 0) / 1e6 for file in found.siblings or ()}
        files = wanted(sizes, weights=weights)
        missing = [
            file
            for file in files
            if not isinstance(try_to_load_from_cache(name, file, revision=found.sha), str)
        ]
        size = sum(sizes[file] for file in missing)
        print(f"{name}: {len(files)} files, {len(missing)} to download, {size:.1f} MB", flush=True)
        for file in sorted(missing, key=sizes.__getitem__):
            print(f"Downloading {file} ({sizes[file]:.1f} MB)", flush=True)
            # by the branch's name: readers find the newest commit by it
            hf_hub_download(name, file)
    except (errors.GatedRepoError, errors.RepositoryNotFoundError) as error:
        raise HubError(_refused(name, gated=isinstance(error, errors.GatedRepoError))) from None
    except errors.HFValidationError as error:
        raise HubError(f"model.name={name!r} is not a valid hub id: {error}") from None
    except Exception as error:  # of the client's HTTP library, which differs between its versions
        _require_cached(
            name, weights=weights, why=str(error).strip().partition("\n")[0] or type(error).__name__
        )


def _refused(name: str, *, gated: bool) -> str:
    if gated:
        return (
            f"the model {name} is gated, and the hub was asked without a token that may read it. Accept its licence on"
            " its page, export HF_TOKEN here and put 'HF_TOKEN' into host.secrets."
        )
    return (
        f"the hub lacks a model {name}, or this account may not read it. Check model.name; for a private one export"
        " HF_TOKEN here and put 'HF_TOKEN' into host.secrets."
    )


def _require_cached(name: str, *, weights: bool, why: str = "") -> None:
    """Raise HubError unless the cache holds the whole model: for when the hub is not asked, or does not answer."""
    asked = f"the hub does not answer ({why})" if why else "HF_HUB_OFFLINE is set"
    try:
        directory = snapshot_download(name, local_files_only=True)
    except (errors.LocalEntryNotFoundError, OSError):
        directory = ""
    if not directory or not is_whole(Path(directory), weights=weights):
        raise HubError(
            f"the model {name} is not in this host's cache, and {asked}. Check the host's network, name a mirror as"
            " HF_ENDPOINT in host.env, or copy the model to the host and name its directory in model.name."
        )
    print(f"{name}: taken from this host's cache ({asked})", flush=True)


def is_whole(directory: Path, *, weights: bool) -> bool:
    """Return whether a snapshot has its configuration and, if asked, all files of one format of weights."""
    # without links whose file is missing
    names = {path.name for path in directory.iterdir() if path.exists()}
    if "config.json" not in names:
        return False
    indexes = [
        name for name in names if name.endswith((".safetensors.index.json", ".bin.index.json"))
    ]
    parts = [
        set(json.loads((directory / name).read_text())["weight_map"].values()) for name in indexes
    ]
    single = any(fnmatch(name, pattern) for name in names - set(NOT_WEIGHTS) for pattern in WEIGHTS)
    return not weights or (any(part <= names for part in parts) if parts else single)


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="rollouts.worker.trainer_hub", description=__doc__.split("\n")[0]
    )
    parser.add_argument("name")
    parser.add_argument("--no-weights", action="store_true")
    arguments = parser.parse_args()
    try:
        fetch(arguments.name, weights=not arguments.no_weights)
    except HubError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
