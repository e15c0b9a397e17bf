"""A data set and a chat template are data: whatever their files ask for, nothing of them is run."""

import io
import os
import pickle
import tarfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
import pytest

from rollouts.data_formats.row import DataError
from rollouts.training.datasets.chat_template import ChatTemplate
from rollouts.training.datasets.rows import read_rows


class Touch:
    """Unpickled, it makes a file."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> tuple[Any, tuple[Any, ...]]:
        return os.mkdir, (str(self.file),)


def script(directory: Path, attacked: Path) -> None:
    (directory / f"{directory.name}.py").write_text(f"open({str(attacked)!r}, 'w')\n")


def shard(kind: str) -> Any:
    def make(directory: Path, attacked: Path) -> None:
        with tarfile.open(directory / "train.tar", "w") as archive:
            for name, data in ((f"1.{kind}", pickle.dumps(Touch(attacked))), ("1.txt", b"x")):
                member = tarfile.TarInfo(name)
                member.size = len(data)
                archive.addfile(member, io.BytesIO(data))

    return make


@pytest.mark.parametrize("make", [script, *map(shard, ("pyd", "pickle", "pkl", "pth", "npy"))])
def test_a_data_set_runs_nothing(
    make: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Goal: neither a script nor a pickle beside the rows is run. Red with torch.load of a shard's .pth made
    weights_only=False in `datasets`."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    directory, attacked = tmp_path / "d", tmp_path / "attacked"
    directory.mkdir()
    make(directory, attacked)
    try:
        rows = read_rows(str(directory))
    except DataError:
        rows = []
    assert not attacked.exists() and len(rows) <= 1


@pytest.mark.parametrize(
    "template",
    [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ messages.append.__self__.__class__.__base__.__subclasses__() }}",
        "{{ raise_exception.__globals__ }}",
        "{{ cycler.__init__.__globals__.os.mkdir('x') }}",
        "{{ lipsum.__globals__['os'].mkdir('x') }}",
        "{% for message in messages %}{{ message.clear() }}{% endfor %}",
    ],
)
def test_a_chat_template_runs_nothing(
    template: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Goal: a template of somebody else's checkpoint reaches neither Python's own objects nor the rows. Red with a
    plain jinja2.Environment: it listed the classes of this process, and made the directory."""
    monkeypatch.chdir(tmp_path)
    tokenizer = SimpleNamespace(
        get_chat_template=lambda tools: template, special_tokens_map={}, name_or_path="evil"
    )
    messages = [{"role": "user", "content": "hello"}]
    try:
        (text,) = (
            found.text for found in ChatTemplate(tokenizer, None, "row 0").render([messages])
        )
    except DataError as error:
        text = str(error)
    assert "<class" not in text and "'os'" not in text and list(tmp_path.iterdir()) == []
    assert messages == [{"role": "user", "content": "hello"}]
