"""What a config names is looked through before anything is built: paths with their links, dotted names, rows."""

import dataclasses
import json
import struct
from pathlib import Path
from typing import Any

import pytest

from base_config import AgentConfig
from rollouts.remote.git import list_files
from rollouts.remote.inputs import Inputs, look_through
from rollouts.remote.inputs.data_files import count_parameters, count_rows
from rollouts.remote.inputs.modules import read_module, required_keys
from rollouts.remote.inputs.paths import SentFiles
from tests.example_config import example_config, replace_at
from tests.remote.hosts import git

DATA = "configs/data/letters/{}.jsonl"
POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n"
REWARD = "def score(sample):\n    return 1.0\n"


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    directory = tmp_path / "project"
    for name in ("train_sft", "train_rl", "test"):
        write(directory, DATA.format(name), '{"question": "q", "answer": "a"}\n' * 8)
    write(directory, "configs/models/tiny_qwen2/config.json", "{}\n")
    write(directory, ".gitignore", "ignored*\n*.safetensors\n/private/\n")
    git(directory, "init", "-q")
    return directory


def write(directory: Path, name: str, text: str = "") -> Path:
    file = directory / name
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text)
    return file


def look(repository: Path, requirements: tuple[str, ...] = (), **changes: Any) -> Inputs:
    config = example_config()
    for path, value in changes.items():
        config = replace_at(config, path.replace("__", "."), value)
    return look_through(config, SentFiles(repository, list_files(repository)), requirements)


def with_data(config_name: str) -> list[Any]:
    return [dataclasses.replace(example_config().data.rl_mixture[0], name=config_name)]


def texts(inputs: Inputs) -> str:
    return "\n".join(problem.text() for problem in (*inputs.paths.values(), *inputs.problems))


# --- paths ----------------------------------------------------------------------------------------------------------


def test_nothing_is_refused_wrongly(repository: Path) -> None:
    """Goal: plain files, folders, links inside of the tree (chained, through .., to folders) and hub ids pass.
    Red with a file below a linked folder looked up by its name alone."""
    write(repository, "real/rows.jsonl", '{"question": "q", "answer": "a"}\n')
    (repository / "linked").symlink_to("real")
    (repository / "again").symlink_to("./linked/../linked")
    (repository / "configs/one.jsonl").symlink_to("../again/rows.jsonl")
    for name in (
        "real/rows.jsonl",
        "./linked/rows.jsonl",
        "again/rows.jsonl",
        "configs/one.jsonl",
        "configs/../real/rows.jsonl",
    ):
        inputs = look(repository, data__rl_mixture=with_data(name))
        assert not inputs.paths and not inputs.problems, (name, texts(inputs))
        assert inputs.rows["rl_mixture"][0].rows == 1, name
    inputs = look(repository, model__name="Qwen/Qwen2.5-0.5B", data__rl_mixture=with_data("linked"))
    assert not inputs.paths and not inputs.problems


def outside_link(repository: Path) -> str:
    write(repository.parent, "outside/train.jsonl", "{}\n")
    (repository / "mine.jsonl").symlink_to("../outside/train.jsonl")
    return "mine.jsonl"


def absolute_link(repository: Path) -> str:
    (repository / "mine.jsonl").symlink_to(repository / DATA.format("test"))
    return "mine.jsonl"


def linked_folder(repository: Path) -> str:
    write(repository.parent, "outside/rows.jsonl", "{}\n")
    (repository / "data").symlink_to("../outside")
    return "data/rows.jsonl"


def to_an_ignored_file(repository: Path) -> str:
    write(repository, "ignored.jsonl", "{}\n")
    (repository / "mine.jsonl").symlink_to("ignored.jsonl")
    return "mine.jsonl"


def an_ignored_link(repository: Path) -> str:
    (repository / "ignored-link.jsonl").symlink_to(DATA.format("test"))
    return "ignored-link.jsonl"


def dangling(repository: Path) -> str:
    (repository / "mine.jsonl").symlink_to("nowhere.jsonl")
    return "mine.jsonl"


def a_loop(repository: Path) -> str:
    (repository / "mine.jsonl").symlink_to("mine.jsonl")
    return "mine.jsonl"


def above(repository: Path) -> str:
    write(repository.parent, "rows.jsonl", "{}\n")
    return "../rows.jsonl"


def an_annex(repository: Path) -> str:
    write(repository, ".git/annex/objects/x.jsonl", "{}\n")
    (repository / "mine.jsonl").symlink_to(".git/annex/objects/x.jsonl")
    return "mine.jsonl"


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (outside_link, ["leads out of the repository", "mine.jsonl -> ../outside/train.jsonl"]),
        (absolute_link, ["leads out of the repository", "mine.jsonl -> /"]),
        (linked_folder, ["leads out of the repository", "data -> ../outside"]),
        (to_an_ignored_file, ["leads to what git ignores", "mine.jsonl -> ignored.jsonl"]),
        (an_ignored_link, ["git ignores"]),
        (dangling, ["leads nowhere", "mine.jsonl -> nowhere.jsonl"]),
        (a_loop, ["leads nowhere", "mine.jsonl -> mine.jsonl"]),
        (above, ["lies outside of the repository"]),
        (an_annex, ["leads to what git ignores", ".git/annex"]),
    ],
)
@pytest.mark.parametrize("field", ["data", "model"])
def test_where_a_name_leads(make: Any, said: list[str], field: str, repository: Path) -> None:
    """Goal: a name that would lead nowhere on the host is a problem that shows where it leads, and never told to be in
    .gitignore when it is not. Red with names compared with the list of files."""
    name = make(repository)
    changes: dict[str, Any] = (
        {"data__rl_mixture": with_data(name)} if field == "data" else {"model__name": name}
    )
    inputs = look(repository, **changes)
    assert list(inputs.paths) == [name]
    for part in said:
        assert part in inputs.paths[name].text()


@pytest.mark.parametrize("text", [POINTER, "/annex/objects/SHA256E-s1--ab.jsonl\n"])
def test_pointers_are_not_files(text: str, repository: Path) -> None:
    """Goal: a pointer in place of a data set, of a part of one, of a model's weights, of a lock, is a problem with the
    command that fetches it. Red without reading the files."""
    write(repository, "rows.jsonl", text)
    write(repository, "model/config.json", "{}")
    write(repository, "model/weights.bin", text)
    write(repository, "set/train.parquet", text)
    write(repository, "pins.txt", text)
    command = "git lfs pull" if "lfs" in text else "git annex get"
    for changes, file in (
        ({"data__rl_mixture": with_data("rows.jsonl")}, "rows.jsonl"),
        ({"model__name": "model"}, "model/weights.bin"),
        ({"data__sft_mixture": with_data("set")}, "set/train.parquet"),
        ({"host__constraints_file": "pins.txt"}, "pins.txt"),
    ):
        (problem,) = look(repository, **changes).problems
        assert f"{file!r} is a pointer" in problem.message and problem.fix == f"{command} {file}"


def test_a_pretrained_model_without_weights(repository: Path) -> None:
    """Goal: a folder of architecture and tokenizer alone is no pretrained model: told before an environment is built.
    Red with the weights left to the trainer."""
    write(repository, "shape/config.json", "{}")
    pretrained = {"model__name": "shape", "model__init": "pretrained"}
    (problem,) = look(repository, **pretrained).problems
    assert (
        problem.message == "model.name='shape' has no weights."
        and "model.init='random'" in problem.fix
    )
    assert not look(repository, model__name="shape").problems
    write(repository, "shape/model.safetensors", "x")
    assert "has no weights" not in texts(look(repository, **pretrained))


def test_what_git_ignores_inside_of_a_folder(repository: Path) -> None:
    """Goal: a model without its ignored weights, one without a listed shard, a data set without a part: a problem each;
    random weights, junk and weights in another form are none. Red with a folder sent as soon as one file of it is."""
    write(repository, "model/config.json", "{}")
    write(repository, "model/model.safetensors", "x")
    pretrained = {"model__name": "model", "model__init": "pretrained"}
    (problem,) = look(repository, **pretrained).problems
    assert "'model' would reach the host without files that git ignores" in problem.text()
    assert "model/model.safetensors" in problem.found
    assert not look(repository, model__name="model").problems, "random weights need no file"
    write(repository, "model/pytorch_model.bin", "x")
    assert not look(repository, **pretrained).problems, "there are other weights"
    index = {"weight_map": {"a": "model.safetensors"}}
    write(repository, "model/model.safetensors.index.json", json.dumps(index))
    assert "model/model.safetensors" in texts(look(repository, **pretrained))
    write(repository, "set/train.jsonl", "{}\n")
    write(repository, "set/ignored-part.jsonl", "{}\n")
    write(repository, "set/ignored.py", "")
    (problem,) = look(repository, data__sft_mixture=with_data("set")).problems
    assert problem.found == "set/ignored-part.jsonl"
    (repository / "set/ignored-part.jsonl").unlink()
    (repository / "set/test.jsonl").symlink_to("/data/test.jsonl")
    assert "set/test.jsonl -> /data/test.jsonl" in texts(
        look(repository, data__sft_mixture=with_data("set"))
    )


# --- dotted names ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "source",
    [
        REWARD,
        "async " + REWARD,
        "from helpers import *\n",
        "from helpers import score\n",
        "from helpers import other as score\n",
        "import helpers as score\n",
        "score = lambda sample: 1.0\n",
        "(score, x) = make()\n",
        "score: object = make()\n",
        "try:\n    from fast import score\nexcept ImportError:\n    def score(sample):\n        return 0\n",
        "if True:\n    class score: pass\n",
        "with open('x') as score:\n    pass\n",
        "def __getattr__(name):\n    return 1\n",
        "globals()['score'] = print\n",
        "def build():\n    global score\n    score = print\nbuild()\n",
        "if (score := print):\n    pass\n",
        "match print:\n    case score:\n        pass\n",
        "for score in (print,):\n    pass\n",
        "import sys\nsetattr(sys.modules[__name__], 'score', print)\n",
        "from importlib import import_module\nfrom .sub import score\n",
        "try:\n    from fast import score\nexcept ImportError:\n    score = None\n",
        f"score = None\n{REWARD}",
        "score = None\nfrom helpers import score\n",
        "score = None\ndef build():\n    global score\n    score = print\nbuild()\n",
        "score = []\nfor score in (print,):\n    pass\n",
    ],
)
def test_names_that_are_defined(source: str, repository: Path) -> None:
    """Goal: however a module comes to have a name, it is not refused. Red with functions at the top level alone, and
    with a name called a plain value that is one for a while."""
    write(repository, "helpers.py", REWARD + "other = score\n")
    write(repository, "my/sub.py", REWARD)
    write(repository, "my/__init__.py", source)
    write(repository, "mine.py", source.replace("from .sub", "from my.sub"))
    for name in ("mine.score", "my.score"):
        inputs = look(repository, rl__reward__fn=name, rl__sampling__filter_fn="my.sub.score")
        assert not inputs.problems and not inputs.syntax, texts(inputs)


TYPE_ONLY = "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from a import score\n"
SCRIPT_ONLY = f"if __name__ == '__main__':\n    score = print\n{REWARD.replace('score', 'other')}"
IMPORTING = {"mine.py": f"import ignored_helper\n{REWARD}", "ignored_helper.py": ""}
IMPORTING_DEEP = {
    "mine.py": f"from pkg import a\n{REWARD}",
    "pkg/__init__.py": "from .deep import a\n",
    "pkg/deep.py": "import ignored2\na = 1",
    "ignored2.py": "",
}
PACKAGE = {"pkg/__init__.py": "", "pkg/rewards.py": REWARD}
PRIVATE = {"private/__init__.py": "", "private/r.py": REWARD}
REEXPORTING = {"mine.py": "from impl import score\n", "impl.py": "def scores(s): pass\n"}
WRONG_NAMES: list[tuple[dict[str, str], str, list[str]]] = [
    (
        {"mine.py": REWARD},
        "mine.scor",
        ["mine.py defines no 'scor'", "score (line 1)", "write mine.score"],
    ),
    ({"mine.py": TYPE_ONLY}, "mine.score", ["defines no"]),
    ({"mine.py": SCRIPT_ONLY}, "mine.score", ["defines no"]),
    ({"mine.py": "def f():\n    score = print\n"}, "mine.score", ["mine.py defines no 'score'"]),
    (
        {"mine.py": "class A:\n    def score(self): pass\n"},
        "mine.score",
        ["mine.py defines no 'score'"],
    ),
    (REEXPORTING, "mine.score", ["defines no 'score'"]),
    ({"mine.py": "score = 0.5\n"}, "mine.score", ["is not a function", "mine.py:1"]),
    ({"mine.py": ""}, "mine.score", ["mine.py defines no 'score'", "nothing"]),
    (
        {"my_rewards.py": REWARD},
        "my_reward.score",
        ["no module 'my_reward'", "write my_rewards.score"],
    ),
    (PACKAGE, "pkg.reward.score", ["no module 'pkg.reward'", "near: pkg.rewards"]),
    ({"pkg/rewards.py": REWARD}, "pkg.score", ["pkg is a folder without an __init__.py"]),
    (
        {"ignored_reward.py": REWARD},
        "ignored_reward.score",
        ["'ignored_reward.py' is here, but git ignores it"],
    ),
    (PRIVATE, "private.r.score", ["'private/r.py' is here, but git ignores"]),
    (IMPORTING, "mine.score", ["mine.py:1 imports ignored_helper"]),
    (IMPORTING_DEEP, "mine.score", ["pkg/deep.py:1 imports ignored2"]),
]


@pytest.mark.parametrize(("files", "named", "said"), WRONG_NAMES)
def test_dotted_names_that_would_fail(
    files: dict[str, str], named: str, said: list[str], repository: Path
) -> None:
    """Goal: a name that the trainer could not import is a problem now, with file, line and the nearest name; nothing is
    imported for it. Red without the look: it failed after the environments were built."""
    for name, text in files.items():
        write(repository, name, f"{text}\nopen('executed', 'w')\n" if text else text)
    for changes in (
        {"rl__reward__fn": named},
        {"rl__sampling__filter_fn": named},
        {"rl__agent": agent(named)},
    ):
        inputs = look(repository, **changes)
        assert len(inputs.problems) == 1, texts(inputs)
        for part in said:
            assert part in inputs.problems[0].text()
    assert not (repository / "executed").exists() and not Path("executed").exists()


def agent(environment: str) -> AgentConfig:
    return AgentConfig(
        environment=environment, tool_format="json", turns_max=2, tokens_max=64, timeout_s=1.0
    )


def test_dotted_names_that_cannot_be_known(repository: Path) -> None:
    """Goal: a module of another package is a note, one that is required is none, host.env's PYTHONPATH is searched, a
    linked module is read where it leads, and what this Python cannot parse is kept apart for a newer host. Red with any
    module that is not in the repository refused."""
    (note,) = look(repository, rl__reward__fn="verifiers_hub.rewards.score").notes
    assert "verifiers_hub.rewards is not in the repository" in note
    assert not look(repository, ("math-verify==0.8",), rl__reward__fn="math_verify.parse").notes
    write(repository, "src/own/reward.py", REWARD)
    path = {"host__env": {"PYTHONPATH": "/site:src"}}
    assert not look(repository, rl__reward__fn="own.reward.score", **path).problems
    (note,) = look(repository, rl__reward__fn="own.rewards.score", **path).notes
    assert "own.rewards is not in the repository" in note, "it may lie in /site"
    (repository / "linked.py").symlink_to("src/own/reward.py")
    assert "defines no 'skore'" in texts(look(repository, rl__reward__fn="linked.skore"))
    write(repository, "newer.py", "type A = int\ndef score(s:\n")
    inputs = look(repository, rl__reward__fn="newer.score")
    assert not inputs.problems and "newer.py:" in inputs.syntax[0].message
    assert not look(repository, rl__reward__fn="gone.score", output__mode="sft").problems, (
        "not used by this run"
    )


def test_what_an_installed_package_brings(repository: Path) -> None:
    """Goal: Python takes a required package before a folder of its name that has no __init__.py, and a module that is
    not sent hides nothing on the host. Red with such a folder, or file, taken for the module."""
    write(repository, "evaluate/notes.py", "x = 1\n")
    write(repository, "ignored_kit/__init__.py", "")
    write(repository, "mine.py", f"import ignored_kit\n{REWARD}")
    required = ("evaluate>=0.4", "ignored-kit")
    for name in ("evaluate.combine", "evaluate.metrics.f1", "ignored_kit.score", "mine.score"):
        inputs = look(repository, required, rl__reward__fn=name)
        assert not inputs.problems and not inputs.notes, texts(inputs)
        assert look(repository, rl__reward__fn=name).problems, f"{name}: nothing requires it"
    write(repository, "evaluate/__init__.py", "")
    assert look(repository, required, rl__reward__fn="evaluate.combine").problems, "now it is ours"


# --- rows -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, (8, "counted")),
        ({"max_samples": 3, "repeat": 2}, (6, "counted")),
        ({"start": 1, "stop": 6, "step": 2}, (3, "counted")),
        ({"start": 20}, (0, "counted")),
        ({"stop": 100, "shuffle_seed": 3}, (8, "counted")),
        ({"name": "openai/gsm8k"}, (None, "unknown")),
        ({"name": "openai/gsm8k", "max_samples": 5, "repeat": 3}, (15, "at most")),
        ({"name": "openai/gsm8k", "start": 10, "stop": 20, "step": 3}, (4, "at most")),
        ({"name": "label", "format": "spelling_bee", "max_samples": 7}, (7, "counted")),
        ({"name": "/data/rows.jsonl"}, (None, "unknown")),
    ],
)
def test_rows_are_counted_as_the_trainer_selects_them(
    changes: dict[str, Any], expected: tuple[int | None, str], repository: Path
) -> None:
    """Goal: slices, maxima and repetitions as datasets/selection.py has them, blank lines left out. Red with the lines
    of the file taken for the rows."""
    write(repository, DATA.format("train_rl"), '{"a": 1}\n\n' * 8)
    spec = dataclasses.replace(example_config().data.rl_mixture[0], **changes)
    counted = count_rows(spec, SentFiles(repository, list_files(repository)))
    assert (counted.rows, counted.how) == expected


BOTH = {"answer", "level"}
KEYS = [
    ("def r(s):\n    return s.prompt['level']\n", {"level"}),
    ("def r(sample):\n    row = sample.prompt\n    return row['a'] + row['b']\n", {"a", "b"}),
    ("def r(s):\n    return s.prompt.get('level', 1)\n", set()),
    ("def r(s):\n    return s.prompt['level'] if 'level' in s.prompt else 0\n", set()),
    (
        "def r(s):\n    try:\n        return s.prompt['level']\n    except KeyError:\n        return 0\n",
        set(),
    ),
    ("def r(s):\n    s.prompt['seen'] = 1\n    return other['level']\n", set()),
    ("async def r(s, /):\n    return s.prompt['level']\n", {"level"}),
    ("def r(s):\n    if not s.text:\n        return 0\n    return s.prompt['level']\n", {"level"}),
    (
        "def r(s):\n    right = s.prompt['answer'] in s.text\n    return s.prompt['level'] if right else 0\n",
        BOTH,
    ),
    (
        "def r(s):\n    row = s.prompt\n    if row['a'] == 'code':\n        return row['tests']\n    return 1\n",
        {"a"},
    ),
    (
        "def r(s):\n    if s.prompt['a'] != 'code':\n        return 0\n    return s.prompt['tests']\n",
        {"a"},
    ),
    (
        "def r(s):\n    kind = s.prompt['a']\n    if kind in KINDS:\n        return s.prompt['tests']\n    return 0\n",
        {"a"},
    ),
    ("def r(s):\n    return s.prompt['tests'] if s.prompt['a'] == 'code' else 0\n", {"a"}),
    (
        "def r(s):\n    match s.prompt['a']:\n        case 'code':\n            return s.prompt['tests']\n",
        {"a"},
    ),
    ("def r(s):\n    return s.prompt['a'] == 1 and s.prompt['tests']\n", {"a"}),
    (
        "def r(s):\n    for key in ('tests',):\n        if key in s.prompt:\n            return s.prompt['tests']\n",
        set(),
    ),
    ("def r(s):\n    s.prompt.setdefault('tests', [])\n    return s.prompt['tests']\n", set()),
    ("def r(s):\n    s.prompt['tests'] = 1\n    return s.prompt['tests']\n", set()),
    (
        "def r(s):\n    with contextlib.suppress(KeyError):\n        return s.prompt['tests']\n",
        set(),
    ),
]


@pytest.mark.parametrize(("source", "keys"), KEYS)
def test_the_columns_a_reward_needs(source: str, keys: set[str]) -> None:
    """Goal: only what a reward takes from every row. Red with every text in brackets taken for a column, and with
    columns of one kind of row wanted of rows of another kind."""
    assert set(required_keys(read_module(source.encode(), "").functions["r"])) == keys


def test_a_reward_without_its_column(repository: Path) -> None:
    """Goal: a column that no local row has is a problem; one that some row has, that the format makes, or that rows
    elsewhere may have, is none. Red without the look at rows."""
    write(
        repository,
        "mine.py",
        "def score(sample):\n    return sample.prompt['level'] + len(sample.prompt['answer'])\n",
    )
    (problem,) = look(repository, rl__reward__fn="mine.score").problems
    assert (
        "needs the column 'level', which no row has" in problem.message
        and "line 2" in problem.found
    )
    write(repository, "mine2.py", "def score(sample):\n    return len(sample.prompt['question'])\n")
    taken = look(repository, rl__reward__fn="mine2.score")
    assert "needs the column 'question', which no row has" in texts(taken), (
        "the format made messages of it"
    )
    write(repository, "mine3.py", "def score(sample):\n    return sample.prompt['letters']\n")
    choices = [dataclasses.replace(example_config().data.rl_mixture[0], format="multiple_choice")]
    write(
        repository,
        "choices.jsonl",
        '{"question": "q", "choices": {"text": ["a"], "label": ["A"]}, "answerKey": "A"}',
    )
    choices = [dataclasses.replace(choices[0], name="choices.jsonl")]
    assert not look(repository, rl__reward__fn="mine3.score", data__rl_mixture=choices).problems
    tests = look(repository, rl__reward__fn="rollouts.training.rewards.code_tests")
    assert "needs the column 'tests'" in texts(tests)
    hub = [*example_config().data.rl_mixture, *with_data("some/hub")]
    assert not look(repository, rl__reward__fn="mine.score", data__rl_mixture=hub).problems
    write(
        repository,
        DATA.format("train_rl"),
        '{"question": "q", "answer": "a"}\n{"question": "q", "answer": "b", "level": 2}\n',
    )
    assert not look(repository, rl__reward__fn="mine.score").problems


def test_parameters_of_a_local_model(repository: Path, tmp_path: Path) -> None:
    """Goal: counted from the weights' headers, else from the architecture; never guessed. Red with the biases of Qwen2
    left out (the shipped tiny model has 165,184)."""
    shipped = Path(__file__).parents[2] / "configs/models/tiny_qwen2"
    own = count_parameters(shipped, from_weights=False)
    assert own == 165_184
    header = json.dumps(
        {
            "__metadata__": {"a": "b"},
            "w": {"dtype": "F32", "shape": [3, 5], "data_offsets": [0, 60]},
        }
    ).encode()
    (tmp_path / "model.safetensors").write_bytes(
        struct.pack("<Q", len(header)) + header + bytes(60)
    )
    assert count_parameters(tmp_path, from_weights=True) == 15
    write(tmp_path, "config.json", '{"model_type": "mamba", "hidden_size": 8}')
    assert count_parameters(tmp_path, from_weights=False) is None
    (tmp_path / "model.safetensors").write_bytes(b"torn")
    assert count_parameters(tmp_path, from_weights=True) is None


@pytest.mark.parametrize(
    ("selection", "is_told"),
    [
        ({}, True),
        ({"start": 1}, False),
        ({"max_samples": 2, "start": 1}, False),
        ({"step": 2}, True),
        ({"shuffle_seed": 0}, True),
        ({"shuffle_seed": 0, "stop": 2}, False),
    ],
    ids=str,
)
def test_a_wrong_row_counts_where_it_is_read(
    selection: dict[str, Any], is_told: bool, repository: Path
) -> None:
    """Goal: a row that the selection leaves out for certain, or may leave out by its shuffling, is not refused; a line
    that is not JSON is, since the whole file is read. Red with the selection not looked at."""
    good = '{"question": "q", "answer": "a"}\n'
    write(repository, "rows.jsonl", '{"question": 1, "answer": "a"}\n' + 2 * good)
    spec = dataclasses.replace(with_data("rows.jsonl")[0], **selection)
    found = texts(look(repository, data__rl_mixture=[spec]))
    assert ("rows.jsonl:1: question=1" in found) == is_told == bool(found), found
    write(repository, "rows.jsonl", "{\n" + 2 * good)
    assert "rows.jsonl:1: is not JSON" in texts(look(repository, data__rl_mixture=[spec]))
    write(repository, "rows.jsonl", "version https://git-lfs.github.com/spec/v1\n")
    assert "not JSON" not in texts(look(repository, data__rl_mixture=[spec]))
