"""A repository of the user's own, in which no rollouts lies: it goes to the host, and the package beside it."""

import dataclasses
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from base_config import Config
from rollouts.remote import package
from rollouts.remote.errors import DeployError
from rollouts.remote.host.local import LocalTransport
from rollouts.remote.plan import make_plan
from rollouts.remote.repository import read_code, refuse_stray_config
from rollouts.remote.run.sync_code import CodePlace, sync_code
from tests.example_config import example_config, replace_at, sglang
from tests.remote.hosts import ROOT, Host, Laptop, git
from tests.remote.test_plan import FACTS

OWN = {
    "my_rewards.py": "def score(sample):\n    return 1.0\n\n\ndef keep(group):\n    return True\n",
    "train.jsonl": '{"question": "q", "answer": "a"}\n',
    "tiny/config.json": "{}",
}


def make_own(directory: Path, files: dict[str, str] | None = None) -> Path:
    for name, text in {**OWN, **(files or {})}.items():
        (directory / name).parent.mkdir(parents=True, exist_ok=True)
        (directory / name).write_text(text)
    git(directory, "init", "-q")
    git(directory, "add", "-A")
    git(directory, "commit", "-qm", "mine")
    return directory


def own_config(**changes: object) -> Config:
    config = example_config()
    named = {
        f"data.{mixture}.0.name": "train.jsonl"
        for mixture in ("sft_mixture", "rl_mixture", "eval_mixture")
    }
    own = {
        "model.name": "tiny",
        "host.constraints_file": "rollouts:requirements/constraints.txt",
        **named,
    }
    for path, value in {
        **own,
        **{path.replace("__", "."): value for path, value in changes.items()},
    }.items():
        config = replace_at(config, path, value)
    return config


def problems_of(repository: Path, **changes: object) -> str:
    config = own_config(**changes)
    code = read_code(repository, config)
    plan = make_plan(
        config,
        FACTS,
        code,
        target="h",
        run_id="r1",
        local_dir="/here",
        secrets_set=[],
        busy_ok=False,
    )
    return "\n".join(problem.text() for problem in plan.problems)


def test_what_goes_to_the_host(tmp_path: Path) -> None:
    """Goal: the tree is the repository alone; the package is rollouts alone, whole, without caches and locks; both
    digests are in the record. Red with the package's files among the tree's, and with the record of one tree."""
    code = read_code(make_own(tmp_path / "own"), own_config())
    assert set(code.files) == set(OWN) and code.package is not None
    sent = set(code.package.files)
    assert {
        "rollouts/__init__.py",
        "rollouts/worker/launch.py",
        "rollouts/training/loops/rl_loop.py",
    } <= sent
    assert not [
        file
        for file in sent
        if not file.startswith("rollouts/") or "__pycache__" in file or ".txt" in file
    ]
    tracked = {
        name for name in git(ROOT, "ls-files", "-co", "--exclude-standard", "rollouts").splitlines()
    }
    assert {name for name in tracked if (ROOT / name).is_file()} == sent
    record = code.record()
    tree, ours = (
        json.loads(record[f"code/{name}.json"]) for name in ("manifest", "manifest-package")
    )
    assert (
        set(tree["files"]) == set(code.files)
        and set(ours["files"]) == sent
        and tree["digest"] != ours["digest"]
    )
    assert code.requirements == tuple(package.clone_requirements(ROOT, ["train"]))
    assert code.constraints == (ROOT / "requirements/constraints.txt").read_text()


@pytest.mark.parametrize(
    "files",
    [
        {"rollouts/step_1.jsonl": "{}"},
        {"rollouts/run_dir/notes.txt": "", "rollouts/worker/log.txt": ""},
        {"rollouts/__init__.py": "", "pyproject.toml": ""},
        {"base_config.py": "", "deploy.py": "", "tests/__init__.py": "", "random.py": ""},
    ],
    ids=["data", "folders", "package", "modules"],
)
def test_a_folder_s_name_makes_no_clone(files: dict[str, str], tmp_path: Path) -> None:
    """Goal: a repository is a clone by what lies in it. Red with the folder rollouts/, or rollouts/run_dir, as the
    sign."""
    assert read_code(make_own(tmp_path, files), own_config()).package is not None
    assert read_code(ROOT, example_config()).package is None


def test_where_processes_find_their_modules(tmp_path: Path) -> None:
    """Goal: ours in code/package, before the rest of the search path; the user's tree is not looked into first. In a
    clone nothing changes. Red with PYTHONPATH of the trainer alone, and with host.env's in its place."""
    config = own_config(
        host__env={"PYTHONPATH": "src"},
        engine=sglang(requirements_file="rollouts:requirements/sglang-cpu.txt"),
    )
    code = read_code(make_own(tmp_path), config)
    plan = make_plan(
        config, FACTS, code, target="h", run_id="r1", local_dir="/here", secrets_set=[]
    )
    assert plan.launch is not None, [problem.text() for problem in plan.problems]
    package_path = f"{plan.launch.run_path}/code/package"
    assert plan.launch.program_path == package_path
    stubs = f"{package_path}/rollouts/engines/sglang/cpu_stubs:"
    for stage, spec in plan.launch.processes():
        is_engine = spec.window in ("engine-0", "smoke-engine")
        assert spec.env["PYTHONPATH"] == f"{stubs if is_engine else ''}{package_path}:src", (
            stage,
            spec.window,
        )
        assert spec.env["PYTHONSAFEPATH"] == "1"
    code = dataclasses.replace(code, package=None)
    clone = make_plan(
        own_config(), FACTS, code, target="h", run_id="r1", local_dir="/h", secrets_set=[]
    )
    assert (
        clone.launch is not None
        and clone.launch.program_path == f"{clone.launch.run_path}/code/tree"
    )
    assert not [spec for _, spec in clone.launch.processes() if "PYTHONSAFEPATH" in spec.env]


NAMED = [
    ("my_rewards.score", None),
    ("rollouts.training.rewards.exact_match", None),
    ("my_rewards.scor", ["my_rewards.py defines no 'scor'", "score (line 1)", "write my_rewards.score"]),
    ("my_reward.score", ["there is no module 'my_reward' in the repository", "write my_rewards.score"]),
    ("elsewhere.deep.score", ["there is no module 'elsewhere.deep' in the repository", "host.requirements"]),
    ("rollouts.training.rewards.exact_mach", ["defines no 'exact_mach'", "write rollouts.training.rewards.exact"]),
    ("rollouts.training.reward.exact_match", ["no module 'rollouts.training.reward' in rollouts", "rewards.exact"]),
    ("random.score", ["your repository and Python itself have a module 'random'", "rename it"]),
    ("datasets.score", ["your repository and the package datasets have a module 'datasets'", "datasets/__init__.py"]),
    ("rollouts.mine.score", ["your repository and rollouts, which runs there, have a module 'rollouts'", "mine.py"]),
    ("libs.sub.rewards.score", ["lies in the submodule libs/sub, which is not checked out", "submodule update"]),
]  # fmt: skip


@pytest.fixture(scope="module")
def odd(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A repository with names of others, and a submodule that is not checked out."""
    directory = tmp_path_factory.mktemp("odd")
    inner = make_own(directory / "inner", {"rewards.py": "def score(sample):\n    return 1.0\n"})
    names = (
        "random.py",
        "datasets/__init__.py",
        "rollouts/mine.py",
        "tests/__init__.py",
        "deploy.py",
    )
    made = make_own(
        directory / "made", {name: "def score(sample):\n    return 1.0\n" for name in names}
    )
    git(
        made,
        "-c",
        "protocol.file.allow=always",
        "submodule",
        "--quiet",
        "add",
        str(inner),
        "libs/sub",
    )
    git(made, "commit", "-qm", "submodule")
    git(directory, "clone", "-q", str(made), str(directory / "clone"))
    return directory / "clone"


@pytest.mark.parametrize(("reward", "said"), NAMED, ids=[reward for reward, _ in NAMED])
def test_dotted_names_are_looked_up_where_they_will_be_found(
    reward: str, said: list[str] | None, odd: Path
) -> None:
    """Goal: each name is looked up in the repository or in the package, without importing it; what another module
    hides is refused. Red with the package's names looked up in the tree, and with a hidden module taken as found."""
    found = problems_of(odd, rl__reward__fn=reward)
    assert found == "" if said is None else all(text in found for text in said), found


def test_names_that_modules_of_the_user_import(tmp_path: Path) -> None:
    """Goal: `import rollouts.mine`, which the host would look up in the package, is refused; `import random` beside a
    random.py is only noted. Red with imports followed into files that are hidden."""
    files = {"random.py": "import nothing_here\n", "rollouts/mine.py": ""}
    text = "import random\nimport rollouts.mine\n" + OWN["my_rewards.py"]
    repository = make_own(tmp_path, {**files, "my_rewards.py": text})
    found = problems_of(repository, rl__reward__fn="my_rewards.score")
    assert (
        "my_rewards.py:2 imports rollouts.mine: your repository and rollouts" in found
        and "random" not in found
    )
    notes = read_code(repository, own_config(rl__reward__fn="my_rewards.score")).inputs.notes
    assert any(
        "my_rewards.py:1 imports random: your repository and Python itself" in note
        for note in notes
    )


def test_data_in_a_submodule_that_is_not_checked_out(odd: Path) -> None:
    """Goal: a path into it is refused with git's command; unnamed it is a warning. Red with "does not exist"."""
    found = problems_of(odd, data__rl_mixture__0__name="libs/sub/train.jsonl")
    assert (
        "'libs/sub/train.jsonl' lies in the submodule libs/sub, which is not checked out" in found
    )
    code = read_code(odd, own_config())
    assert [
        warning
        for warning in code.warnings
        if "the submodule libs/sub is not checked out" in warning
    ]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (
            {"host__constraints_file": "requirements/constraint.txt"},
            "write 'rollouts:requirements/constraints.txt'",
        ),
        ({"host__constraints_file": "rollouts:requirements/trainer.txt"}, "is not in the package"),
        (
            {"engine": sglang(requirements_file="requirements/sglang-cuda.txt")},
            "'rollouts:requirements/sglang-cuda.txt'",
        ),
        ({"host__constraints_file": "rollouts:requirements/trainer-cuda.txt"}, ""),
    ],
    ids=["constraints", "no such file", "lock", "there"],
)
def test_locks_of_the_package(changes: dict[str, object], said: str, tmp_path: Path) -> None:
    """Goal: "rollouts:requirements/…" names the package's files from anywhere, and a path of a clone's is told that.
    Red with the name looked up in the repository."""
    found = problems_of(make_own(tmp_path), **changes)
    assert said in found and bool(found) == bool(said)


def test_requirements_of_the_user_s_rewards(tmp_path: Path) -> None:
    """Goal: host.requirements are installed into the trainer's environment, which they name; a module of one of them
    is not missing. Red with them left out of the key."""
    repository = make_own(tmp_path)
    plans = []
    for lines in ([], ["levenshtein>=0.26"]):
        config = own_config(
            host__requirements=lines,
            rl__reward__fn="levenshtein.ratio" if lines else "my_rewards.score",
        )
        code = read_code(repository, config)
        plans.append(
            make_plan(config, FACTS, code, target="h", run_id="r", local_dir="/h", secrets_set=[])
        )
    assert [plan.problems for plan in plans] == [(), ()]
    without, with_one = (plan.launch.environments[0] for plan in plans if plan.launch)
    assert (
        with_one.requirements == [*without.requirements, "levenshtein>=0.26"]
        and with_one.path != without.path
    )


@pytest.mark.parametrize(
    ("line", "is_problem"), [("Torch==2.9.0", True), ("torch", False), ("torch==2.*", False)]
)
def test_a_requirement_against_the_constraints(line: str, is_problem: bool, tmp_path: Path) -> None:
    """Goal: two pins of one package are refused before anything is installed. Red with names compared as written."""
    found = problems_of(make_own(tmp_path), host__requirements=[line])
    assert bool(found) == is_problem == ("the constraints pin torch==2.13.0" in found), found


def test_a_repository_without_commits(tmp_path: Path) -> None:
    """Goal: it runs, and one warning says what its record lacks. Red with the note that only --plan shows."""
    (tmp_path / "my_rewards.py").write_text(OWN["my_rewards.py"])
    git(tmp_path, "init", "-q")
    code = read_code(tmp_path, own_config())
    assert len(code.warnings) == 1 and "no commit yet" in code.warnings[0]


def test_configs_that_are_not_the_repository_s(tmp_path: Path) -> None:
    """Goal: a config of elsewhere, and one that git ignores, are refused; a saved one may lie anywhere, and so may a
    config where a clone runs; a link out of it is refused. Red with paths compared through links, for /tmp may be one,
    and with a link's own place alone looked at."""
    own = make_own(tmp_path / "own", {".gitignore": "drafts/\n"})
    (own / "drafts").mkdir()
    (tmp_path / "link").symlink_to(own)
    for name in ("own/run.py", "own/drafts/run.py", "run.py", "run.json"):
        (tmp_path / name).write_text("")
    refuse_stray_config(own, tmp_path / "link/run.py")
    refuse_stray_config(own, tmp_path / "run.json")
    refuse_stray_config(ROOT, tmp_path / "run.py")
    with pytest.raises(DeployError, match="lies outside of the repository"):
        refuse_stray_config(own, tmp_path / "run.py")
    with pytest.raises(DeployError, match="git ignores"):
        refuse_stray_config(own, own / "drafts/run.py")
    for name, target in (("out.py", "../run.py"), ("in.py", "run.py")):
        (own / name).symlink_to(target)
    refuse_stray_config(own, own / "in.py")
    with pytest.raises(DeployError, match="is a link that leads out of the repository"):
        refuse_stray_config(own, tmp_path / "link/out.py")


def package_place(home: Path, run_id: str) -> CodePlace:
    return CodePlace(
        home=str(home), run_path=str(home / "runs" / run_id), project=".p", name="package"
    )


def test_the_package_is_shared_between_runs(tmp_path: Path) -> None:
    """Goal: the second run's package is links to the first's; one that was changed there meanwhile is not launched.
    Red with the digest of the tree alone compared."""
    code = read_code(make_own(tmp_path / "own"), own_config())
    assert code.package is not None
    manifest = json.loads(code.record()["code/manifest-package.json"])["files"]
    sent = {"root": code.package.root, "files": code.package.files, "expected": manifest}
    for run_id in ("one", "two"):
        sync_code(LocalTransport(), package_place(tmp_path, run_id), **sent)
    first, second = (
        tmp_path / f"runs/{run_id}/code/package/rollouts/manifest.py" for run_id in ("one", "two")
    )
    assert (
        first.stat().st_ino == second.stat().st_ino
        and not (tmp_path / "runs/one/code/tree").exists()
    )
    second.unlink()
    second.write_text("changed")
    with pytest.raises(DeployError, match="not the code that was planned"):
        sync_code(LocalTransport(), package_place(tmp_path, "two"), **sent)


PROGRAM = """
import os, sys
from rollouts.training.user_code import find_user_code, hiding_module
find_user_code()
import random, helpers, mine
from rollouts.training.rewards import resolve
is_pythons = os.path.dirname(random.__file__) == os.path.dirname(os.__file__)
print(is_pythons, helpers.__file__, "PYTHONSAFEPATH" in os.environ)
try:
    resolve("anyio.score")
except ValueError as error:
    print(error)
"""


def test_the_user_s_modules_come_last(tmp_path: Path) -> None:
    """Goal: own modules are found, those of other names hide nothing, and a name that is taken is told. Red with the
    tree first on the path: `import random` was the user's."""
    for name in ("random", "helpers", "mine", "anyio", "rollouts"):
        (tmp_path / f"{name}.py").write_text("def score(sample):\n    return 1.0\n")
    (tmp_path / "program.txt").write_text(PROGRAM)
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONSAFEPATH": "1"}
    command = [sys.executable, "-c", PROGRAM]
    done = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    first, second = done.stdout.splitlines()
    assert first == f"True {tmp_path}/helpers.py False"
    assert "anyio/__init__.py is imported in place of the module in your repository" in second


def test_bad_places_touch_nothing(
    laptop: Laptop, make_host: Callable[..., Host], tmp_path: Path
) -> None:
    """Goal: from the command: no repository, a config of elsewhere: one message, exit 2, nothing on host or here."""
    host = make_host()
    own = make_own(tmp_path / "own")
    for name in ("plain/run.py", "own/run.py"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(
            "from base_config import *\n" + f"config = load_config({str(tmp_path / 'c.json')!r})\n"
        )
    own_config().save(tmp_path / "c.json")
    for cwd, file, said in (
        (tmp_path / "plain", "run.py", "is not in a git repository"),
        (own, "../plain/run.py", "lies outside of the repository"),
    ):
        done = laptop.deploy(file, "--remote", host.target, cwd=cwd)
        assert done.returncode == 2 and said in done.stderr and done.stderr.count("error:") == 1, (
            done.stderr
        )
    assert not (host.home / "runs").exists() and not (laptop.rollouts_home / "registry").exists()
