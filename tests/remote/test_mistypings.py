"""Ways of mistyping, as a person makes them: each is told with its place, what is allowed or near, and the fix."""

import contextlib
import io
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import pytest

import deploy as command
from rollouts.config import as_source
from rollouts.remote import commands
from rollouts.remote.host.transport import LOCAL_TARGET
from tests.remote.hosts import Host, Laptop
from tests.remote.test_own_repository import make_own, own_config
from tests.remote.test_plan import FACTS

ROWS = "".join(f'{{"question": "q{n}", "answer": "a"}}\n' for n in range(8))
REWARDS = "my_rewards.py"


@dataclass(frozen=True)
class Typed:
    """What was typed wrong: in a file (old text, new text; or all of it), or on the command line."""

    said: tuple[str, ...]
    words: tuple[str, ...] = ("run.py",)
    edit: tuple[str, str] = ("", "")  # of run.py
    files: Mapping[str, str | bytes] = field(default_factory=dict)


def in_config(old: str, new: str, *said: str) -> Typed:
    return Typed(said, edit=(old, new))


def setting(text: str, *said: str) -> Typed:
    return Typed((text.partition("=")[0], *said), ("run.py", "--set", text))


def line(text: str, *said: str) -> Typed:
    return Typed(said, tuple(text.split(" ")))


def rows(last: str | bytes, *said: str) -> Typed:
    text = ROWS.encode() + (last if isinstance(last, bytes) else last.encode())
    return Typed((f"train.jsonl:{ROWS.count(chr(10)) + 1}: ", *said), files={"train.jsonl": text})


def reward(text: str, *said: str) -> Typed:
    return Typed(said, files={REWARDS: text})


NEW = "new n.py --gpus 0 --mode"
HOST = "[user@]host[:port]"
CASES = {
    # fields and values of the config file
    "a field": in_config("sft=SFTConfig(", "sft=SFTConfig(matrx_lr=1.0, ", "run.py:83", "'matrx_lr'"),
    "a field that is left out": in_config("        num_iterations=4,\n", "", "run.py:83", "'num_iterations'"),
    "a section": in_config("SFTConfig(", "SFTConfg(", "run.py:83", "did you mean 'SFTConfig'"),
    "a field without its name": in_config("GRPO(", "GRPO('batch', ", "run.py:", "takes its fields by name"),
    "a bracket": in_config("config = Config(", "config = Config((", "run.py:3", "never closed"),
    "the name config": in_config("config = Config(", "confg = Config(", "defines no `config`", "config = Config(...)"),
    "a choice": in_config('"group_mean"', '"group-mean"', "rl.baseline='group-mean'", "did you mean 'group_mean'"),
    "a device": in_config('"cpu"', '"gpu"', "target.device_type='gpu'", "'cuda', 'cpu', 'mps'"),
    "a text for a number": in_config("batch_size=8", "batch_size='8'", "sft.batch_size='8'", "needs int"),
    "another case": in_config("DataConfig(", "Dataconfig(", "did you mean 'DataConfig'"),
    # --set
    "set: a field": setting("sft.matrix_l=1", "did you mean 'sft.matrix_lr'"),
    "set: a stage": setting("stf.matrix_lr=1", "did you mean 'sft.matrix_lr'"),
    "set: another case": setting("SFT.MATRIX_LR=1", "did you mean 'sft.matrix_lr'"),
    "set: no value": setting("sft.matrix_lr", "needs field=value"),
    "set: a colon": setting("sft.matrix_lr:1e-3", "needs field=value"),
    "set: spaces": line("run.py --set sft.matrix_lr = 1", "'=' stands alone", "--set rl.matrix_lr=1e-6"),
    "set: two at once": line("run.py --set sft.matrix_lr=1 rl.matrix_lr=1", "'rl.matrix_lr=1' stands alone", "each"),
    "set: of two sections": setting("matrix_lr=1", "sft.matrix_lr or rl.matrix_lr"),
    "set: an empty value": setting("sft.matrix_lr=", "needs float", "nothing stands"),
    "set: a comma at the end": setting("sft.matrix_lr=1e-3,", "nothing stands", "a comma begins"),
    "set: a decimal comma": setting("sft.weight_decay=0,001", "'001'", "a comma begins the value of another run"),
    "set: a letter": setting("sft.matrix_lr=1e-3x", "'1e-3x'", "needs float"),
    "set: a typographic minus": setting("sft.matrix_lr=1e−3", "− is not a sign of numbers"),
    "set: 1e3 for a count": setting("sft.num_iterations=1e3", "needs int", "write 1000"),
    "set: true": setting("model.compile=true", "needs bool", "write True"),
    "set: null": setting("rl.kl=null", "needs a KLConfig", "write None"),
    "set: a list without quotes": setting("host.requirements=[numpy]", "needs a list", """'["numpy"]'"""),
    "set: a text for a list": setting("host.requirements=numpy", "needs a list", """'["numpy"]'"""),
    "set: a field of a group": setting("rl.loss=PPO(clip_lo=0.2)", "no field 'clip_lo'", "'clip_low'"),
    "set: half a group": setting("rl.loss=PPO(clip_low=0.2)", "PPO needs", "'clip_high'", "no field has a default"),
    "set: a group's name": setting("rl.loss=PPO", "needs one of GRPO, PPO", "write PPO(advantage_norm=…"),
    "set: a group that is none": setting("rl.loss=PP0(clip_low=0.2)", "did you mean 'PPO'"),
    "set: an item of a list": setting("data.sft_mixture[0].name=x", "did you mean 'data.sft_mixture.0.name'"),
    "set: a variable": setting("host.env.HF_HOME=/x", "did you mean 'host.env'"),
    "set: twice": line("run.py --set sft.matrix_lr=1 --set sft.matrix_lr=2", "sft.matrix_lr is set twice"),
    "set: below zero": setting("sft.matrix_lr=-1e-3", "-0.001", ">= 0"),
    # rewards
    "a function": setting("rl.reward.fn=my_rewards.scor", "my_rewards.py defines no 'scor'", "write my_rewards.score"),
    "a module": setting("rl.reward.fn=my_reward.score", "no module 'my_reward'", "write my_rewards.score"),
    "a file's name": setting("rl.reward.fn=my_rewards.py", "my_rewards.py defines no 'py'", "score (line 1)"),
    "a colon": setting("rl.reward.fn=my_rewards:score", "did you mean 'my_rewards.score'"),
    "a path": setting("rl.reward.fn=./my_rewards/score", "did you mean 'my_rewards.score'"),
    "a call": setting("rl.reward.fn=my_rewards.score()", "did you mean 'my_rewards.score'"),
    "a file and a function": setting("rl.reward.fn=my_rewards.py:score", "did you mean 'my_rewards.score'"),
    "a filter": setting("rl.sampling.filter_fn=my_rewards.kep", "defines no 'kep'", "write my_rewards.keep"),
    "a reward of two": reward("def score(prompt, answer):\n    return 1\n", "my_rewards.py:1: score(prompt, answer)"),
    "a colon that is missing": reward("def score(sample)\n    return 1\n", "my_rewards.py:1: expected ':'"),
    "a column": reward("def score(s):\n    return s.prompt['anwser']\n", "'anwser', which no row has", "line 2"),
    "a number for a function": reward("score = 3\n", "is not a function", "my_rewards.py:1"),
    # data and models
    "a file": setting("data.sft_mixture.0.name=trian.jsonl", "'trian.jsonl' does not exist", "write 'train.jsonl'"),
    "an ending": setting("data.sft_mixture.0.name=train.json", "'train.json' is not in", "write 'train.jsonl'"),
    "no ending": setting("data.sft_mixture.0.name=train", "write 'train.jsonl'"),
    "a folder": setting("data.sft_mixture.0.name=data/train.jsonl", "does not exist", "write 'train.jsonl'"),
    "a home": setting("data.sft_mixture.0.name=~/train.jsonl", "~ is not followed"),
    "a path of the host": setting("data.sft_mixture.0.name=/none/x.jsonl", "'/none/x.jsonl' does not exist on"),
    "a format": setting("data.sft_mixture.0.format=mesages", "did you mean 'messages'"),
    "a model": setting("model.name=tiney", "'tiney' is not in", "owner/name", "write 'tiny'"),
    "a model's path": setting("model.name=./tiney", "does not exist", "write 'tiny'"),
    "constraints": setting("host.constraints_file=rollouts:requirements/constraint.txt", "constraints.txt'"),
    "a key": rows('{"qestion": "q", "answer": "a"}', "has no 'question' (it has qestion, answer)"),
    "a number for a text": rows('{"question": "q", "answer": 3}', "answer=3", "needs a text"),
    "null": rows('{"question": null, "answer": "a"}', "question=None"),
    "JSON": rows('{"question": "q", "answer": }', "is not JSON"),
    "an array": rows('["q", "a"]', "is an array; needs an object, one a line"),
    "another encoding": rows('{"question": "q", "answer": "é"}'.encode("latin-1"), "is not UTF-8", "iconv"),
    # verbs, options, hosts, names
    "a config": line("rum.py", "rum.py: no such file", "Did you mean run.py"),
    "a config without its ending": line("run", "Did you mean `deploy run.py`"),
    "a verb": line("atach run", "Did you mean `deploy attach`"),
    "a verb's case": line("LS", "Did you mean `deploy ls`"),
    "an option": line("run.py --plna", "no option --plna", "Did you mean --plan"),
    "an option with one dash": line("run.py -plan", "no option -plan", "Did you mean --plan"),
    "an option without dashes": line("run.py plan", "'plan' after run.py", "Did you mean --plan"),
    "two configs": line("run.py other.py", "one config at a time: run.py, then other.py"),
    "a number": line("run.py --skip x", "Usage: deploy CONFIG", "'--skip'", "is not a valid int"),
    "skip without a sweep": line("run.py --skip 1", "--skip 1 without a sweep", "--set with several values"),
    "yes without a sweep": line("run.py --yes", "--yes without a sweep", "leave out --yes"),
    "a run's name": line("run.py --run-id my/run", "'my/run' cannot name a run", "letters, digits"),
    "a run": line("status nothing", "there is no run 'nothing'", "deploy ls"),
    "a host that is none": line("run.py --remote no-such-host.invalid", "does not resolve", "~/.ssh/config"),
    "a host with a path": line("run.py --remote h:/home", "'h:/home' is not a valid host", HOST),
    "a host that was forgotten": line("run.py --remote --plan", "'--plan' is not a valid host", HOST),
    "a port": line("run.py --remote h:99999", "port 99999", "1 to 65535"),
    "explain": line("explain rl.baselin", "did you mean 'rl.baseline'"),
    "explain: another case": line("explain RL.BASELINE", "did you mean 'rl.baseline'"),
    "explain: a value": line("explain rl.temperature=1", "did you mean 'rl.temperature'"),
    "new: stages": line(f"{NEW} stf --model tiny --data train.jsonl", "--mode 'stf'", "did you mean 'sft'"),
    "new: a model": line(f"{NEW} sft --model ./tinny --data train.jsonl", "--model ./tinny", "did you mean 'tiny'"),
    "new: data": line(f"{NEW} sft --model tiny --data trian.jsonl", "--data trian.jsonl", "did you mean 'train.jsonl'"),
    "new: a format": line(f"{NEW} sft --model tiny --data train.jsonl --format mesages", "did you mean 'messages'"),
    "new: an ending": line("new n.yml --gpus 0 --mode sft --model tiny --data train.jsonl", "n.yml", "deploy new n.py"),
    "diff": line("diff run.py rum.py", "rum.py: no such file", "Did you mean run.py"),
}  # fmt: skip


@pytest.fixture(scope="module")
def source() -> str:
    return as_source(own_config(rl__reward__fn="my_rewards.score"))


@pytest.fixture(scope="module")
def repository(source: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_own(
        tmp_path_factory.mktemp("typed") / "mine", {"run.py": source, "train.jsonl": ROWS}
    )


@pytest.fixture
def run(
    repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Callable[[Typed], str]]:
    """Type it in the repository, where this machine is a host that could run it; return what is said."""
    before = {path: path.read_bytes() for path in repository.iterdir() if path.is_file()}
    monkeypatch.chdir(repository)
    monkeypatch.setenv("ROLLOUTS_HOME", str(tmp_path / "rollouts"))
    look = commands.look_at_host
    monkeypatch.setattr(
        commands,
        "look_at_host",
        lambda to, *a, **k: FACTS if to.target == LOCAL_TARGET else look(to, *a, **k),
    )
    monkeypatch.setattr(
        commands, "launch_and_watch", lambda *a, **k: pytest.fail("it was launched")
    )

    def type_it(typed: Typed) -> str:
        old, new = typed.edit
        text = (repository / "run.py").read_text()
        assert old in text
        (repository / "run.py").write_text(text.replace(old, new, 1))
        for name, content in typed.files.items():
            (repository / name).write_bytes(
                content if isinstance(content, bytes) else content.encode()
            )
        names = sorted(repository.rglob("*"))
        said, out = io.StringIO(), io.StringIO()
        with (
            contextlib.redirect_stderr(said),
            contextlib.redirect_stdout(out),
            pytest.raises(SystemExit) as ended,
        ):
            command.app(args=list(typed.words), prog_name="deploy")
        assert ended.value.code == 2, out.getvalue() + said.getvalue()
        assert sorted(repository.rglob("*")) == names and not (tmp_path / "rollouts").exists()
        return said.getvalue()

    yield type_it
    for path, content in before.items():
        path.write_bytes(content)


@pytest.mark.parametrize("name", CASES)
def test_a_mistyping(name: str, run: Callable[[Typed], str]) -> None:
    """Goal: one message with the place, what is allowed or near, and the fix; exit 2; nothing is made or left behind.
    Red with any of the hints taken out."""
    typed = CASES[name]
    said = run(typed)
    assert [text for text in typed.said if text not in said] == [], said
    assert "Traceback" not in said and "run-config" not in said


def test_what_is_right_is_launched(run: Callable[[Typed], str]) -> None:
    """Goal: the repository of the table is one that runs, so that only the mistyping refuses it."""
    with pytest.raises(pytest.fail.Exception, match="it was launched"):
        run(Typed(()))
    with pytest.raises(pytest.fail.Exception, match="it was launched"):
        run(setting("data.sft_mixture.0.max_samples=7"))


@pytest.mark.parametrize("name", ["a key", "a function", "a file"])
def test_nothing_reaches_the_host(
    name: str, source: str, laptop: Laptop, make_host: Callable[..., Host], tmp_path: Path
) -> None:
    """Goal: over a real sshd too, nothing is sent before it is told."""
    typed, host = CASES[name], make_host()
    files = {
        key: text.decode() if isinstance(text, bytes) else text for key, text in typed.files.items()
    }
    own = make_own(tmp_path / "own", {"run.py": source, "train.jsonl": ROWS, **files})
    done = laptop.deploy(*typed.words, "--remote", host.target, cwd=own)
    assert done.returncode == 2 and all(text in done.stderr for text in typed.said), done.stderr
    assert not (host.home / "runs").exists() and not (laptop.rollouts_home / "registry").exists()
