"""`deploy data`: rows as the model will see them, without torch."""

import itertools
import json
import os
import pty
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from rollouts.config import as_source
from rollouts.remote import data_verb
from rollouts.remote.errors import DeployError
from rollouts.training.datasets.preview import Bin, histogram, spans_of
from rollouts.training.types import Sample
from rollouts.view.samples import mixtures_text
from rollouts.view.screen import Screen
from tests.example_config import example_config, replace_at
from tests.remote.test_own_repository import make_own, own_config
from tests.training import tiny_task

ROOT = Path(__file__).resolve().parents[2]
WITHOUT_TORCH = (
    "import sys; sys.modules['torch'] = None;"
    " from rollouts.worker.data_preview import main; sys.exit(main())"
)


def run_preview(tmp_path: Path, **changes: Any) -> subprocess.CompletedProcess[str]:
    config = example_config()
    for path, value in changes.items():
        config = replace_at(config, path.replace("__", "."), value)
    config.save(tmp_path / "config.json")
    argv = [sys.executable, "-c", WITHOUT_TORCH, str(tmp_path / "config.json"), "--rows", "2"]
    return subprocess.run(argv, cwd=ROOT, capture_output=True, text=True, check=False)


def test_every_mixture_without_torch(tmp_path: Path) -> None:
    """Goal: counts, lengths and the first rows of each mixture come without torch; what is too long is left out by
    reason, and the lengths add up to what is kept."""
    done = run_preview(tmp_path, data__max_length=14)
    assert done.returncode == 0, done.stderr
    sft, rl, held = json.loads(done.stdout)
    assert [part["mixture"] for part in (sft, rl, held)] == [
        "sft_mixture",
        "rl_mixture",
        "eval_mixture",
    ]
    kept = sum(part["count"] for part in sft["lengths"])
    assert sft["left_out"] == {"longer than max_length=14 tokens": 4000 - kept} and 0 < kept < 4000
    assert max(part["end"] for part in sft["lengths"]) == 14
    assert len(sft["rows"]) == 2 and [span["trained"] for span in sft["rows"][0]["spans"]] == [
        False,
        True,
    ]
    assert (
        rl["rows"][0]["where"].startswith("answer: ")
        and rl["rows"][0]["spans"][0]["trained"] is False
    )


def test_rows_that_cannot_be_read(tmp_path: Path) -> None:
    """Goal: a broken row ends it with one line that names the place."""
    done = run_preview(tmp_path, model__name="configs/models/nowhere")
    assert (
        done.returncode == 1
        and done.stderr.splitlines()[-1].startswith("error: ")
        and "Traceback" not in done.stderr
    )


def test_spans_and_histogram() -> None:
    """Goal: spans join to the whole text, special tokens too, and change where training does; every length is in one
    bin."""
    tokenizer = tiny_task.tiny_tokenizer()
    ids = tokenizer("abc")["input_ids"]
    sample = Sample(
        prompt="",
        response="",
        tokens=[*ids, tokenizer.eos_token_id],
        loss_mask=[0.0, 1.0, 1.0, 0.0],
    )
    assert [span.trained for span in spans_of(sample, tokenizer)] == [False, True, False]
    assert "".join(span.text for span in spans_of(sample, tokenizer)) == tokenizer.decode(
        sample.tokens
    )
    assert histogram([]) == [] and histogram([5]) == [Bin(5, 5, 1)]
    bins = histogram(list(range(1, 100)))
    assert sum(part.count for part in bins) == 99 and (bins[0].start, bins[-1].end >= 99) == (
        1,
        True,
    )
    assert all(before.end + 1 == after.start for before, after in itertools.pairwise(bins))


def test_the_text() -> None:
    """Goal: trained text stands in brackets, or is green; bars follow the counts; what the data has of a terminal's
    signs is spelled out in both. Without rows nothing is said of marks. Red with them explained all the same."""
    spans = [{"text": "ask ", "trained": False}, {"text": "answer\n\x1b[31mred", "trained": True}]
    mixture = {
        "mixture": "sft_mixture",
        "summary": "2 examples",
        "lengths": [{"start": 1, "end": 4, "count": 2}, {"start": 5, "end": 8, "count": 1}],
        "rows": [{"where": "rows.jsonl:1", "spans": spans}],
    }
    lines = mixtures_text([mixture], colour=False).splitlines()
    assert "    ask [answer" in lines and "    \\x1b[31mred]" in lines
    green = mixtures_text([mixture], colour=True).splitlines()
    assert "    ask \x1b[32manswer\x1b[39m" in green and "    \x1b[32m\\x1b[31mred\x1b[39m" in green
    assert lines[1].count("#") == 2 * lines[2].count("#") == 40
    assert mixtures_text([{**mixture, "rows": []}], colour=False).splitlines() == lines[:3]


def test_what_is_missing_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Goal: a laptop without the packages is told what to install, before anything runs."""
    example_config().save(tmp_path / "config.json")
    monkeypatch.setattr(
        data_verb.importlib.util, "find_spec", lambda name: None if name == "datasets" else name
    )
    with pytest.raises(DeployError, match="missing here: datasets"):
        path = str(tmp_path / "config.json")
        data_verb.show_data(
            path, Screen(as_json=False), rows=1, remote=None, accept_new_host_key=False
        )


@pytest.mark.parametrize(
    ("below", "no_color"), [("", ""), ("notes/deep", "1")], ids=["from its root", "from below"]
)
def test_a_repository_with_names_of_python_s(below: str, no_color: str, tmp_path: Path) -> None:
    """Goal: from any folder of a repository with a types.py and a rollouts/ of its own rows are read, in colour on a
    terminal, in brackets with NO_COLOR."""
    shutil.copytree(ROOT / "configs/models/tiny_qwen2", tmp_path / "tiny")
    own = make_own(
        tmp_path,
        {"types.py": "raise ImportError\n", "rollouts/__init__.py": "", "notes/deep/n.txt": ""},
    )
    config = own_config(model__name="tiny", output__mode="sft")
    (own / "run.py").write_text(as_source(config))
    ours, theirs = pty.openpty()
    words = [sys.executable, str(ROOT / "deploy.py"), "data", str(own / "run.py"), "--rows", "1"]
    environment = {**os.environ, "TERM": "xterm", "NO_COLOR": no_color}
    done = subprocess.run(
        words, cwd=own / below, stdout=theirs, stderr=subprocess.PIPE, env=environment, check=False
    )
    os.close(theirs)
    printed = os.read(ours, 65536).decode()
    os.close(ours)
    assert done.returncode == 0, done.stderr
    assert ("\x1b[32m" in printed) == (not no_color) and ("in [brackets]" in printed) == bool(
        no_color
    ), printed


def test_a_preview_goes_with_its_command(tmp_path: Path) -> None:
    """Goal: on the host, what was sent for a preview goes once its rows are rendered, also where the laptop is gone;
    another one's goes once nothing changed in it, and not before. Red without the trap, and with all others removed."""
    preview, other = tmp_path / "previews/0123abcd", tmp_path / "previews/4567cdef"
    (preview / "code/tree").mkdir(parents=True)
    (other / "code").mkdir(parents=True)
    command = [
        "sh",
        "-c",
        data_verb._RENDER,
        str(preview),
        "NAME=x",
        "sh",
        "-c",
        'cat "$0"; exit 5',
    ]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=preview / "code/tree"
    ) as process:
        assert process.stdin is not None and process.stdout is not None
        process.stdout.close()  # nobody listens any more
        process.stdin.write(b"{}")
        process.stdin.close()
        assert process.wait(200) != 0
    assert not preview.exists() and other.exists()
    remove = ["sh", "-c", data_verb._REMOVE, "sh", str(tmp_path), str(preview)]
    subprocess.run([*remove, "60"], check=True)
    assert other.exists()
    subprocess.run([*remove, "0"], check=True)
    assert not (tmp_path / "previews").exists()
