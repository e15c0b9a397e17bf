"""`deploy new`: a whole config from a few choices."""

import dataclasses
import itertools
import json
import runpy
from pathlib import Path
from typing import Any

import pytest

from rollouts.config import SGLang
from rollouts.config.families import FAMILIES, family_of, known_models
from rollouts.remote.errors import DeployError
from rollouts.remote.inputs.shapes import shape_of
from rollouts.remote.new_config import Asked, new_config

# What the hub states for each repository, in parameters
STATED = {
    "Qwen/Qwen2.5-0.5B": 494_032_768,
    "Qwen/Qwen2.5-1.5B": 1_543_714_304,
    "Qwen/Qwen2.5-3B": 3_085_938_688,
    "Qwen/Qwen2.5-7B": 7_615_616_512,
    "Qwen/Qwen2.5-14B": 14_770_033_664,
    "Qwen/Qwen2.5-32B": 32_763_876_352,
    "Qwen/Qwen3-0.6B": 596_049_920,
    "Qwen/Qwen3-1.7B": 1_720_574_976,
    "Qwen/Qwen3-4B": 4_022_468_096,
    "Qwen/Qwen3-8B": 8_190_735_360,
    "Qwen/Qwen3-14B": 14_768_307_200,
    "Qwen/Qwen3-32B": 32_762_123_264,
    "meta-llama/Llama-3.2-1B-Instruct": 1_235_814_400,
    "meta-llama/Llama-3.2-3B-Instruct": 3_212_749_824,
    "meta-llama/Llama-3.1-8B-Instruct": 8_030_261_248,
    "google/gemma-3-270m-it": 268_098_176,
    "google/gemma-3-1b-it": 999_885_952,
    "HuggingFaceTB/SmolLM3-3B": 3_075_098_624,
    "HuggingFaceTB/SmolLM2-135M-Instruct": 134_515_008,
    "HuggingFaceTB/SmolLM2-360M-Instruct": 361_821_120,
    "HuggingFaceTB/SmolLM2-1.7B-Instruct": 1_711_376_384,
    "mistralai/Mistral-7B-Instruct-v0.3": 7_248_023_552,
    "mistralai/Mistral-Nemo-Instruct-2407": 12_247_782_400,
    "mistralai/Mistral-Small-24B-Instruct-2501": 23_572_403_200,
    "allenai/OLMo-2-0425-1B-Instruct": 1_484_916_736,
    "allenai/OLMo-2-1124-7B-Instruct": 7_298_617_344,
    "allenai/OLMo-2-1124-13B-Instruct": 13_716_198_400,
    "allenai/OLMo-2-0325-32B-Instruct": 32_234_279_936,
}


def asked(tmp_path: Path, **changes: Any) -> Asked:
    usual = Asked(
        file=tmp_path / "my_run.py",
        mode="sft+rl",
        model="Qwen/Qwen3-0.6B",
        data="openai/gsm8k",
        rl_data=None,
        format=None,
        reward="my_rewards.score",
        gpus=1,
        gpu_memory_gib=80.0,
        lora=False,
        max_length=2048,
        max_new_tokens=512,
        package_files="",
    )
    return dataclasses.replace(usual, **changes)


def write_rows(path: Path, *rows: Any) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_the_families_have_the_parameters_that_the_hub_states() -> None:
    """Goal: the table's sizes are right to the last parameter. Red with any number of the table changed."""
    counted = {name: shape_of(fields).parameters for name, fields in known_models().items()}
    for name, stated in STATED.items():
        assert counted.pop(name) == stated, name
    assert all(family_of(name) is FAMILIES[0] for name in counted), (
        "only chat models of the first family are left"
    )


@pytest.mark.parametrize("model", list(known_models()))
def test_every_combination(tmp_path: Path, model: str) -> None:
    """Goal: for each model of the table, mode, LoRA or not, and host, the file that is written loads to the config that
    was planned, without problems; or the error names what would fit. Each model fits somewhere in each way. Red with
    mem_fraction taken as it was, and with trainer and engine always apart."""
    hosts = ((1, 24.0), (1, 80.0), (2, 80.0), (4, 80.0), (8, 80.0), (8, 141.0))
    for mode, lora in itertools.product(("sft", "rl", "sft+rl"), (False, True)):
        fitting = 0
        for gpus, memory in hosts:
            choice = asked(
                tmp_path, mode=mode, model=model, lora=lora, gpus=gpus, gpu_memory_gib=memory
            )
            try:
                new = new_config(choice)
            except DeployError as error:
                assert "GiB" in str(error) and (
                    "--gpus" in str(error) or "--gpus" in error.problems[0].fix
                )
                continue
            fitting += 1
            choice.file.write_text(new.text)
            assert runpy.run_path(str(choice.file))["config"] == new.config
            choice.file.unlink()
            assert new.config.problems() == () and len(new.memory) > 1
        assert fitting, f"{model} {mode} lora={lora}"


def test_the_layout(tmp_path: Path) -> None:
    """Goal: one GPU is shared, with an engine that sleeps; of several the engine has half; a model that fits in no such
    half shares all. Red with the second try left out."""
    one = new_config(asked(tmp_path)).config
    assert isinstance(one.engine, SGLang) and one.engine.sleep_while_training
    assert one.target.gpu_ranks == one.engine.gpu_ranks == [0]
    four = new_config(asked(tmp_path, gpus=4)).config
    assert isinstance(four.engine, SGLang) and (four.target.gpu_ranks, four.engine.gpu_ranks) == (
        [0, 1],
        [2, 3],
    )
    assert (four.target.sharding, four.engine.replicas, four.engine.router_port) == (
        "full_shard",
        2,
        30190,
    )
    large = new_config(asked(tmp_path, model="Qwen/Qwen3-32B", gpus=8, gpu_memory_gib=141.0)).config
    assert (
        isinstance(large.engine, SGLang)
        and large.target.gpu_ranks == list(range(8)) == large.engine.gpu_ranks
    )


def test_on_a_cpu(tmp_path: Path) -> None:
    """Goal: --gpus 0 makes a config for this machine: float32, the embedded engine, no CUDA lock. Red with the card's
    settings left in."""
    data = write_rows(
        tmp_path / "rows.jsonl", *({"question": f"{n}?", "answer": str(n)} for n in range(100))
    )
    config = new_config(
        asked(tmp_path, gpus=0, data=data, model="configs/models/tiny_qwen2")
    ).config
    assert (config.target.device_type, config.model.dtype) == ("cpu", "float32")
    assert config.engine is not None and config.engine.kind == "embedded"
    assert "cuda" not in str(config.host.constraints_file)
    train, held = config.data.rl_mixture[0], config.data.eval_mixture[0]
    assert (train.stop, held.start, held.stop) == (95, 95, -1), (
        "the rows that are held out train nothing"
    )
    assert config.rl is not None and config.rl.examples_per_step == 4, (
        "100 rows leave 20 steps an epoch"
    )


@pytest.mark.parametrize(
    ("row", "found"),
    [
        ({"messages": [{"role": "user", "content": "hi"}]}, "messages"),
        ({"question": "1+1?", "answer": "2"}, "question_answer"),
        ({"question": "1+1?", "answer": "1+1=2 #### 2"}, "gsm8k"),
        ({"question": "?", "choices": {}, "answerKey": "A"}, "multiple_choice"),
        ({"text": "once"}, "text"),
        ([{"role": "user", "content": "hi"}], "custom_json"),
    ],
)
def test_the_format_of_rows(tmp_path: Path, row: Any, found: str) -> None:
    """Goal: a file's format is told by its keys. Red with question and answer looked for first."""
    data = write_rows(tmp_path / "rows.jsonl", *[row] * 40)
    assert (
        new_config(asked(tmp_path, mode="sft", data=data)).config.data.sft_mixture[0].format
        == found
    )


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"data": "nowhere.jsonl"}, "nowhere.jsonl: no such file"),
        ({"data": "some/set"}, "its form is not known"),
        ({"data": "some/set", "format": "mesages"}, "did you mean 'messages'"),
        ({"data": "empty.jsonl"}, "has no rows"),
        ({"data": "bad.jsonl"}, "bad.jsonl:2: not JSON"),
        ({"data": "odd.jsonl"}, "its rows have prompt, which is none"),
        ({"data": "fine.jsonl", "reward": None}, "--reward is missing"),
        (
            {"data": "odd.jsonl", "format": "question_answer"},
            "odd.jsonl: row 1: has no 'question' (it has prompt)",
        ),
        ({"data": "odd.jsonl", "format": "messages"}, "row 1: has no 'messages'"),
        ({"data": "deep.jsonl"}, "deep.jsonl:1: not JSON"),
        ({"model": "./mdel"}, "./mdel: no such directory"),
        ({"model": "./empty"}, "./empty: its config.json is missing"),
        ({"gpus": -3}, "--gpus -3: needs 0"),
        ({"gpu_memory_gib": float("nan")}, "--gpu-memory-gib nan: needs 1"),
        ({"gpu_memory_gib": float("inf")}, "--gpu-memory-gib inf: needs 1"),
        ({"file": Path("there.py")}, "exists already, and is left"),
        ({"file": Path("my_run.yaml")}, "a config is a .py file"),
        ({"model": "Qwen/Qwen3-32B"}, "its weights take"),
        ({"max_new_tokens": 4096}, "--max-new-tokens 4096 leaves no room"),
    ],
)
def test_what_cannot_be_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any], says: str
) -> None:
    """Goal: each mistake is one message that names the option or the file and line. Red with a traceback."""
    monkeypatch.chdir(tmp_path)
    Path("empty.jsonl").write_text("\n")
    Path("bad.jsonl").write_text('{"text": "a"}\n{"text"\n')
    Path("odd.jsonl").write_text('{"prompt": "a"}\n')
    Path("fine.jsonl").write_text('{"question": "1+1?", "answer": "2"}\n')
    Path("deep.jsonl").write_text("[" * 100_000 + "\n")
    Path("empty").mkdir()
    Path("there.py").write_text("mine")
    with pytest.raises(DeployError) as error:
        new_config(asked(tmp_path, **changes))
    assert says in str(error.value)
    assert Path("there.py").read_text() == "mine"


def test_the_file_explains_every_field(tmp_path: Path) -> None:
    """Goal: each field stands with its comment, a class's at its first place alone; lines are 120 columns at most. Red
    with comments left out of lists."""
    text = new_config(asked(tmp_path, gpus=2)).text
    assert text.count("# take every step-th row") == 1 and text.count("step=1,") == 3
    assert "matrix_lr=2e-05,  # learning rate of all other weights" in text
    assert max(map(len, text.splitlines())) <= 120
    assert "'" not in text.replace("'s", "").replace("s'", ""), "texts stand in double quotes"


def test_a_model_here(tmp_path: Path) -> None:
    """Goal: a directory's own config.json and weights decide: without weights they are drawn, and the disk that is
    asked for follows its size. Red with every unknown model taken for a billion parameters."""
    data = write_rows(
        tmp_path / "rows.jsonl",
        *({"question": f"{n}?", "answer": "a\u2028b\x85"} for n in range(100)),
    )
    text = Path(data).read_text()
    Path(data).write_text(
        json.dumps({"question": "?", "answer": "a\u2028b\x85"}, ensure_ascii=False) + "\n" + text
    )
    tiny = new_config(asked(tmp_path, gpus=0, data=data, model="configs/models/tiny_qwen2")).config
    assert tiny.model.init == "random" and tiny.host.disk_free_gib_min < 10
    assert tiny.data.rl_mixture[0].stop == 101 - 5, (
        "a row may hold characters that other readers end lines at"
    )


def test_a_name_that_is_no_python(tmp_path: Path) -> None:
    """Goal: whatever a model is called, the file is Python that builds the config. Red with the heading as it is."""
    choice = asked(tmp_path, model='a"""\\b', gpus=0)
    new = new_config(choice)
    choice.file.write_text(new.text)
    assert runpy.run_path(str(choice.file))["config"] == new.config


def test_what_is_not_looked_for_is_said(tmp_path: Path) -> None:
    """Goal: a hub id that may be misspelt is told with the nearest that is known, and so is who looks for a reward; a
    known model and a reward that formats have are not. Red with a "?" in the memory's table alone."""
    misspelt, reward = new_config(asked(tmp_path, model="Qwen/Qwen3-0.6")).unchecked
    assert "did you mean 'Qwen/Qwen3-0.6B'?" in misspelt and "--model Qwen/Qwen3-0.6 " in misspelt
    assert "--reward my_rewards.score was not looked for" in reward and "--plan" in reward
    ours = "rollouts.training.rewards.exact_match"
    assert new_config(asked(tmp_path, reward=ours)).unchecked == ()
    (near,) = new_config(asked(tmp_path, reward=ours.replace("exact", "exakt"))).unchecked
    assert f"did you mean '{ours}'?" in near


@pytest.mark.parametrize("mode", ["sft", "rl", "sft+rl"])
def test_a_few_rows(tmp_path: Path, mode: str) -> None:
    """Goal: a file that is too short to hold rows out makes a config too, without evaluations. Red with the usual
    eval_every, which has no rows."""
    data = write_rows(
        tmp_path / "rows.jsonl",
        {"question": "1+1?", "answer": "2"},
        {"question": "2?", "answer": "2"},
    )
    config = new_config(asked(tmp_path, gpus=0, data=data, mode=mode)).config
    assert config.data.eval_mixture == [] and config.problems() == ()
