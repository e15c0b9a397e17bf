"""A checkpoint is data: whatever its files ask for, nothing of it is run."""

import enum
import io
import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import anyio
import pytest
import torch
from torch.distributed.checkpoint.metadata import BytesStorageMetadata

from rollouts.manifest import write_manifest
from rollouts.training import optimizer_state
from rollouts.training.checkpoint import CheckpointError
from rollouts.training.loops.train_step import train_step
from rollouts.training.model_loading import ModelError, load_model, load_tokenizer
from rollouts.training.reference import load_reference
from rollouts.training.sharded_reader import UnsafeIndexError, read_index
from tests.training.backends.test_pytorch import sft_batch
from tests.training.tiny import tiny_backend


class Call:
    """Pickled, it is a call that unpickling makes."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.function, self.arguments = function, arguments

    def __reduce__(self) -> tuple[Any, tuple[Any, ...]]:
        return self.function, self.arguments


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of one step."""
    backend = tiny_backend(tmp_path_factory.mktemp("run") / "sft")
    anyio.run(lambda: train_step(backend, sft_batch(3), None))
    return anyio.run(lambda: backend.save_checkpoint(1, {"loss": 0.5}))


@pytest.fixture
def victim(saved: Path, tmp_path: Path) -> Path:
    """A copy to be changed; its manifest is made anew by `resume`, as an attacker would."""
    return Path(shutil.copytree(saved, tmp_path / "sft" / saved.name))


def resume(victim: Path) -> dict[str, Any]:
    write_manifest(victim)
    backend = tiny_backend(victim.parent / "resumed", seed=5)
    return anyio.run(backend.load_checkpoint, victim)


def edited(victim: Path, change: Callable[[Any], Any]) -> None:
    """The optimizer's index with `change` made to it."""
    index = victim / "optimizer" / ".metadata"
    index.write_bytes(pickle.dumps(change(pickle.loads(index.read_bytes()))))


def with_bytes(metadata: Any) -> Any:
    name = next(iter(metadata.state_dict_metadata))
    metadata.state_dict_metadata[name] = BytesStorageMetadata()
    return metadata


def with_file(metadata: Any, path: str) -> Any:
    for key in metadata.storage_data:
        metadata.storage_data[key].relative_path = path
    return metadata


def test_what_a_run_wrote_is_read(victim: Path) -> None:
    """Goal: the limits cost a real checkpoint nothing. Red with any of its data classes not admitted."""
    assert resume(victim)["step"] == 1
    assert read_index(victim / "optimizer").state_dict_metadata


class EnumsByName(pickle.Pickler):
    """Pickle as Python 3.11.0 to 3.11.3 does (Debian 12's among them), on whatever Python the tests run."""

    def reducer_override(self, thing: Any) -> Any:
        if isinstance(thing, enum.Enum):
            return getattr, (type(thing), thing.name)
        return NotImplemented


def test_what_another_python_wrote_is_read(victim: Path) -> None:
    """Goal: members of enumerations are read in each way that a Python writes them. Red with getattr not admitted: the
    first checkpoint of a run under Python 3.11.2 was refused and the run failed."""
    index = victim / "optimizer" / ".metadata"
    expected = read_index(index.parent)
    with index.open("wb") as file:
        EnumsByName(file).dump(expected)
    assert b"getattr" in index.read_bytes()
    assert read_index(index.parent) == expected


def pickles(target: Path) -> dict[str, bytes]:
    """Ways to run `touch TARGET` from a pickle, or to get there."""
    touch = f"touch {target}"
    module, name, argument = (
        b"\x8c" + bytes([len(text)]) + text.encode() for text in ("torch", DOTTED, touch)
    )
    return {
        "system": pickle.dumps(Call(__import__("os").system, touch)),
        "eval": pickle.dumps(Call(eval, f"__import__('os').system({touch!r})")),
        "nested": pickle.dumps(
            SimpleNamespace(state_dict_metadata={"a": Call(__import__("os").system, touch)})
        ),
        "open": pickle.dumps(Call(open, str(target), "w")),
        "getattr": pickle.dumps(Call(getattr, "", "format")),
        "getattr of a class": pickle.dumps(Call(getattr, torch.Size, "__subclasses__")),
        "dotted": b"\x80\x04"
        + module
        + name
        + b"\x93"
        + argument
        + b"\x85R.",  # torch . serialization.os.system
        "global": f"cos\nsystem\n(S'{touch}'\ntR.".encode(),
        "torch.load": pickle.dumps(Call(torch.load, io.BytesIO(b""))),
    }


DOTTED = "serialization.os.system"
WAYS = [
    "system",
    "eval",
    "nested",
    "open",
    "getattr",
    "getattr of a class",
    "dotted",
    "global",
    "torch.load",
]


@pytest.mark.parametrize("way", WAYS)
def test_the_optimizers_index_runs_nothing(victim: Path, tmp_path: Path, way: str) -> None:
    """Goal: an error that names the file and what it asks for. Red with torch's own reading: the file was made."""
    target = tmp_path / "attacked"
    (victim / "optimizer" / ".metadata").write_bytes(pickles(target)[way])
    with pytest.raises(
        CheckpointError, match=r"optimizer/\.metadata: .*(no part of a checkpoint|cannot be read)"
    ):
        resume(victim)
    with pytest.raises(UnsafeIndexError):
        optimizer_state.check_complete(victim / "optimizer")
    assert not target.exists()


@pytest.mark.parametrize("name", ["training_state.pt", "optimizer/__0_0.distcp"])
@pytest.mark.parametrize("way", ["system", "eval", "global"])
def test_no_other_file_of_a_checkpoint_runs_anything(
    victim: Path, tmp_path: Path, name: str, way: str
) -> None:
    """Goal: a pickle in place of a checkpoint's other files is refused. Red with weights_only=False."""
    target = tmp_path / "attacked"
    (victim / name).write_bytes(pickles(target)[way])
    with pytest.raises(CheckpointError, match=r"not plain data|cannot be read"):
        resume(victim)
    assert not target.exists()


def test_the_training_states_torch_file_runs_nothing(victim: Path, tmp_path: Path) -> None:
    """Goal: neither in torch's own format, around the call. Red with weights_only=False."""
    target = tmp_path / "attacked"
    torch.save(
        {"rng": Call(__import__("os").system, f"touch {target}")}, victim / "training_state.pt"
    )
    with pytest.raises(CheckpointError, match=r"training_state\.pt: is not plain data"):
        resume(victim)
    assert not target.exists()


def test_a_training_state_that_is_no_dict_is_refused(victim: Path) -> None:
    """Goal: an error that names the file. Red: TypeError, list indices must be integers."""
    torch.save([1], victim / "training_state.pt")
    with pytest.raises(CheckpointError, match=r"training_state\.pt: holds list, needs a dict"):
        resume(victim)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        # which torch would unpickle without limits
        (with_bytes, "is BytesStorageMetadata, needs a tensor"),
        (
            lambda metadata: with_file(metadata, "../training_state.pt"),
            "names the file '../training_state.pt'",
        ),
        (lambda metadata: with_file(metadata, "/etc/passwd"), "names the file '/etc/passwd'"),
        (lambda metadata: {"a": 1}, "is dict, needs the index of a checkpoint"),
    ],
)
def test_what_the_index_leads_to_is_checked(
    victim: Path, change: Callable[[Any], Any], message: str
) -> None:
    """Goal: tensors in files of its own directory alone. Red with the index taken as torch gives it."""
    edited(victim, change)
    with pytest.raises(CheckpointError, match=message):
        resume(victim)


@pytest.mark.parametrize("load", [load_model, load_tokenizer, load_reference])
def test_a_directorys_own_code_is_not_run_unasked(
    saved: Path, tmp_path: Path, load: Callable[[str], Any]
) -> None:
    """Goal: modeling code beside the weights needs trust_remote_code. Red with it set to True: the file was made."""
    directory, target = Path(shutil.copytree(saved, tmp_path / "m")), tmp_path / "attacked"
    (directory / "evil.py").write_text(f"open({str(target)!r}, 'w')\n")
    own = {
        "AutoConfig": "evil.C",
        "AutoModelForCausalLM": "evil.M",
        "AutoTokenizer": ["evil.T", None],
    }
    for name in ("config.json", "tokenizer_config.json"):
        file = directory / name
        text = json.loads(file.read_text()) if file.exists() else {}
        file.write_text(
            json.dumps(
                {**text, "model_type": "evil", "tokenizer_class": "EvilTokenizer", "auto_map": own}
            )
        )
    with pytest.raises(ModelError, match=r"cannot load the .* of .*trust_remote_code"):
        load(str(directory))
    assert not target.exists()
