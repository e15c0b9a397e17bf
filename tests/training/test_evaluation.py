"""Exact match by engine and in process. The engine is a real embedded server."""

import copy
import itertools
import json
import math
import runpy
import shutil
import subprocess
import sys
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import GenerationConfig

from rollouts.training.evaluation import (
    Evaluation,
    Sampling,
    evaluate_with_engine,
    evaluate_with_model,
    exact_match,
    mix_tasks,
    pass_at_k,
    task_of,
)
from rollouts.training.in_process_answers import batches_of
from rollouts.training.rollout_gen.engine_generate import make_generate_fn
from rollouts.training.types import Sample
from rollouts.training.weight_sync import SGLangEngine
from tests.engines.serving import serving
from tests.ports import free_port
from tests.training.tiny_task import tiny_model, tiny_tokenizer

ROWS = [
    {
        "messages": [
            {"role": "user", "content": "abcdefghij"[index % 4 :][: 3 + index % 5] + str(index)}
        ],
        "answer": "",
    }
    for index in range(30)
]


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return tiny_tokenizer()


@pytest.fixture(scope="module")
def model() -> Any:
    """Weights that speak: random ones scaled up, so that greedy answers differ from prompt to prompt."""
    model = tiny_model(seed=3)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(2.0)
    return model


@pytest.fixture(scope="module")
def checkpoint(model: Any, tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("model")
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


@pytest.fixture(scope="module")
def engine_url(checkpoint: Path) -> Iterator[str]:
    with serving(checkpoint) as url:
        yield url


@pytest.mark.anyio
async def test_both_ways_count_the_same(model: Any, tokenizer: Any, engine_url: str) -> None:
    """Goal: one number for the same weights. A third of the rows are made right by what the model says.

    Red when the in-process way right-padded its prompts, and when text after the end token was compared.
    """
    said = evaluate_with_model(model, tokenizer, ROWS, max_new_tokens=6, batch_size=7).responses
    assert len(set(said)) > 5
    rows = [
        {**row, "answer": said[index] if index % 3 == 0 else "no"} for index, row in enumerate(ROWS)
    ]
    in_process = evaluate_with_model(model, tokenizer, rows, max_new_tokens=6, batch_size=4)
    async with SGLangEngine(engine_url) as one, SGLangEngine(engine_url) as two:
        by_engine = await evaluate_with_engine(
            [one, two], tokenizer, rows, max_new_tokens=6, rows_per_request=8
        )
    assert in_process == by_engine
    assert in_process.exact_match == 10 / 30 and in_process.num_rows == 30


@pytest.mark.anyio
async def test_stop_tokens_end_the_text_whatever_they_are(
    model: Any, tokenizer: Any, engine_url: str
) -> None:
    """Goal: a stop token that is no special one stands in neither way's text. Red without the cut."""
    said = evaluate_with_model(model, tokenizer, ROWS, max_new_tokens=6).responses
    stops = [
        1,
        tokenizer(next(text for text in said if len(text) > 2 and text[1].isascii())[1])[
            "input_ids"
        ][0],
    ]
    in_process = evaluate_with_model(model, tokenizer, ROWS, max_new_tokens=6, stop_token_ids=stops)
    async with SGLangEngine(engine_url) as engine:
        by_engine = await evaluate_with_engine(
            [engine], tokenizer, ROWS, max_new_tokens=6, stop_token_ids=stops
        )
    assert in_process == by_engine and in_process.responses != said


@pytest.mark.anyio
async def test_groups_from_a_real_engine_match_a_forward_pass(
    model: Any, tokenizer: Any, engine_url: str
) -> None:
    """Goal: trainer and sampler agree on every sampled token. Red with log-probs shifted by one."""
    async with SGLangEngine(engine_url) as engine:
        generate = make_generate_fn([engine], tokenizer, max_new_tokens=6, temperature=0.7)
        samples = await generate([ROWS[0]] * 4, seed=5)
        again = await generate([ROWS[0]] * 4, seed=5)
    assert samples == again and len({tuple(sample.tokens) for sample in samples}) > 1
    for sample in samples:
        with torch.no_grad():
            logits_TV = model(input_ids=torch.tensor([sample.tokens])).logits[0].float()
        start = len(sample.tokens) - sample.response_length
        logprobs_TV = (logits_TV / 0.7).log_softmax(-1)
        expected = [
            float(logprobs_TV[t - 1, sample.tokens[t]]) for t in range(start, len(sample.tokens))
        ]
        assert sample.rollout_log_probs == pytest.approx(expected, abs=1e-4)


@pytest.mark.anyio
async def test_an_engine_that_is_gone_is_an_error(tokenizer: Any) -> None:
    """Goal: no half-evaluated number. Red when failed rows counted as wrong."""
    url = f"http://127.0.0.1:{free_port()}"
    with pytest.raises(Exception, match=url):
        await evaluate_with_engine([SGLangEngine(url)], tokenizer, ROWS[:3], max_new_tokens=2)


def test_the_training_mode_stays(model: Any, tokenizer: Any) -> None:
    """Goal: evaluation in the middle of training changes nothing. Red without the restore."""
    for training in (True, False):
        model.train(training)
        evaluate_with_model(model, tokenizer, ROWS[:2], max_new_tokens=2)
        assert model.training is training


def test_exact_match_of_texts() -> None:
    """Goal: shares by hand; white space around does not count. Red without strip."""
    assert exact_match(["a", " b\n", "c"], ["a", "b", "x"]) == pytest.approx(2 / 3)
    with pytest.raises(ValueError, match="1 responses for 2 answers"):
        exact_match(["a"], ["a", "b"])
    with pytest.raises(ValueError, match="0 responses"):
        exact_match([], [])


def test_nothing_to_evaluate_is_an_error(model: Any, tokenizer: Any) -> None:
    """Goal: no division by nothing, no 0.0 that means nothing. Red without the checks."""
    with pytest.raises(ValueError, match="no rows"):
        evaluate_with_model(model, tokenizer, [], max_new_tokens=2)


@given(st.integers(1, 9), st.data())
def test_pass_at_k_is_the_share_of_draws_with_a_right_one(n: int, data: st.DataObject) -> None:
    """Goal: over every way to draw k of n answers, the share that holds a right one. Red with 1 - (1 - c/n)^k."""
    right, k = data.draw(st.integers(0, n)), data.draw(st.integers(1, n))
    draws = list(itertools.combinations(range(n), k))
    assert pass_at_k(n, right, k) == pytest.approx(
        sum(min(draw) < right for draw in draws) / len(draws), abs=1e-12
    )


def test_pass_at_k_of_many_samples_and_bad_arguments() -> None:
    """Goal: no overflow, no cancellation, no k that cannot be estimated. Red with float(math.comb(...)): overflow."""
    exact = 1 - Fraction(math.comb(90_000, 50_000), math.comb(100_000, 50_000))
    assert pass_at_k(100_000, 10_000, 50_000) == float(exact) == 1.0
    assert pass_at_k(10**6, 1, 1) == pytest.approx(1e-6, rel=1e-9)
    for n, c, k in ((4, 1, 5), (4, 1, 0), (4, 5, 1), (0, 0, 1)):
        with pytest.raises(ValueError, match=rf"n={n}, c={c}, k={k}"):
            pass_at_k(n, c, k)


def test_a_task_of_the_name_all_is_not_taken_for_all() -> None:
    """Goal: a row's "task" column may say anything. Red: those rows' share stood for that of all rows."""
    found = Evaluation(
        ["all", "b", "b", "b"], ["x"] * 4, [True, False, False, False], 0, [0] * 4
    ).metrics()
    assert {task: values["exact_match"] for task, values in found.items()} == {
        "all": 0.25,
        "all (task)": 1.0,
        "b": 0.0,
    }


def test_metrics_by_task() -> None:
    """Goal: each task's own means, and the total over rows (not over tasks). Red with the mean of the tasks' means."""
    found = Evaluation(["a", "b", "b"], ["", "", ""], [True, False, False], 2, [2, 1, 0])
    assert found.metrics([1, 2]) == {
        "all": {"exact_match": pytest.approx(1 / 3), "pass@1": 0.5, "pass@2": pytest.approx(2 / 3)},
        "a": {"exact_match": 1.0, "pass@1": 1.0, "pass@2": 1.0},
        "b": {"exact_match": 0.0, "pass@1": 0.25, "pass@2": 0.5},
    }
    assert list(found.metrics()) == ["all", "a", "b"]
    # one task needs no second line
    assert list(Evaluation(["a"], [""], [True], 0, [0]).metrics()) == ["all"]
    with pytest.raises(ValueError, match=r"pass@3: needs 1 <= k <= 2"):
        found.metrics([3])


def test_rows_of_several_data_sets_are_mixed_and_named() -> None:
    """Goal: the first N rows stand for all tasks; a row's own task wins. Red without the shuffle."""
    rows = mix_tasks(
        [("one", [{"n": n} for n in range(50)]), ("two", [{"n": 0, "task": "own"}] * 50)], seed=1
    )
    assert sorted({task_of(row) for row in rows[:20]}) == ["one", "own"]
    assert rows == mix_tasks(
        [("one", [{"n": n} for n in range(50)]), ("two", [{"n": 0, "task": "own"}] * 50)], seed=1
    )
    (sample,) = mix_tasks([("one", [Sample("p", metadata={"where": "x"})])], seed=0)
    assert sample.metadata == {"task": "one", "where": "x"} and task_of(sample) == "one"
    assert [task_of(item) for item in ("text", {"format": "gsm8k"}, Sample({"format": "x"}))] == [
        "all",
        "gsm8k",
        "x",
    ]


@pytest.mark.anyio
async def test_sampled_answers_of_both_ways(model: Any, tokenizer: Any, engine_url: str) -> None:
    """Goal: n answers a row, each judged with its own row; near temperature 0 they are the greedy one.

    Red with answers dealt to rows as n blocks of rows in place of rows of n answers, for the in-process way with the
    order of lengths left in, for the engine with each request taking the first rows' seeds.
    """
    said = evaluate_with_model(model, tokenizer, ROWS, max_new_tokens=4).responses
    rows = [
        {**row, "answer": said[index] if index % 3 == 0 else "no"} for index, row in enumerate(ROWS)
    ]
    cold = Sampling(num_samples=3, temperature=1e-4, seed=1)
    in_process = evaluate_with_model(
        model, tokenizer, rows, max_new_tokens=4, batch_size=7, sampling=cold
    )
    async with SGLangEngine(engine_url) as engine:
        by_engine = await evaluate_with_engine(
            [engine], tokenizer, rows, max_new_tokens=4, rows_per_request=8, sampling=cold
        )
        drawn: dict[int, list[str]] = {8: [], 30: []}
        for cut, texts in drawn.items():
            await evaluate_with_engine(
                [engine],
                tokenizer,
                rows,
                max_new_tokens=2,
                rows_per_request=cut,
                sampling=Sampling(num_samples=3, seed=1),
                score_fn=lambda sample, texts=texts: float(texts.append(sample.response) is None),
            )
    assert in_process == by_engine and in_process.num_right == [
        3 if index % 3 == 0 else 0 for index in range(30)
    ]
    assert in_process.metrics([2])["all"] == {"exact_match": 10 / 30, "pass@2": 10 / 30}
    # a row's seed is its own, however requests are cut
    assert drawn[8] == drawn[30] and len(set(drawn[8])) > 10


def test_sampling_is_random_and_leaves_training_as_it_was(model: Any, tokenizer: Any) -> None:
    """Goal: warm answers differ, follow from their seed, and take nothing from the global generator. Red unforked."""
    texts: list[str] = []

    def score(sample: Sample) -> float:
        texts.append(sample.response)
        return 0.0

    def drawn(seed: int) -> list[str]:
        texts.clear()
        sampling = Sampling(num_samples=8, temperature=2.0, seed=seed)
        evaluate_with_model(
            model, tokenizer, ROWS[:1], max_new_tokens=4, sampling=sampling, score_fn=score
        )
        return texts[1:]

    before = torch.get_rng_state()
    first = drawn(1)
    assert torch.equal(before, torch.get_rng_state())
    assert len(set(first)) > 1 and drawn(1) == first and drawn(2) != first


def test_the_models_own_generation_settings_have_no_part_in_it(model: Any, tokenizer: Any) -> None:
    """Goal: Qwen ships repetition_penalty 1.1, which no engine applies here. Red with the model's config left in."""
    plain = evaluate_with_model(model, tokenizer, ROWS, max_new_tokens=6)
    own = model.generation_config
    model.generation_config = GenerationConfig(
        repetition_penalty=5.0, eos_token_id=own.eos_token_id
    )
    try:
        assert evaluate_with_model(model, tokenizer, ROWS, max_new_tokens=6) == plain
        assert model.generation_config.repetition_penalty == 5.0
    finally:
        model.generation_config = own


def test_a_wrapped_models_settings_come_back(model: Any, tokenizer: Any) -> None:
    """Goal: a LoRA model's export keeps its generation_config. Red with the wrapper's alone put back."""
    wrapped = peft.get_peft_model(
        copy.deepcopy(model), peft.LoraConfig(target_modules="all-linear")
    )
    base = wrapped.get_base_model()
    base.generation_config.repetition_penalty = 5.0
    # new adapters change nothing
    found = evaluate_with_model(wrapped, tokenizer, ROWS[:8], max_new_tokens=6)
    assert (
        found.responses
        == evaluate_with_model(model, tokenizer, ROWS[:8], max_new_tokens=6).responses
    )
    assert base.generation_config.repetition_penalty == 5.0


def test_sampling_that_makes_no_sense_is_refused(model: Any, tokenizer: Any) -> None:
    """Goal: no pass@k of zero samples. Red without the check: a division by zero."""
    with pytest.raises(ValueError, match=r"num_samples=0.*needs num_samples >= 1"):
        evaluate_with_model(
            model, tokenizer, ROWS[:1], max_new_tokens=1, sampling=Sampling(num_samples=0)
        )


RUN_EVAL = Path(__file__).resolve().parents[2] / "scripts" / "run_eval.py"


@pytest.mark.parametrize("by_engine", [False, True])
def test_run_eval_counts_what_the_library_counts(  # noqa: PLR0917
    model: Any, tokenizer: Any, engine_url: str, checkpoint: Path, tmp_path: Path, by_engine: bool
) -> None:
    """Goal: one command from a checkpoint to a table and JSON, per task. Red with the second --data left out.

    Red by engine with --engine-url ignored, once the checkpoint's own weights are taken away.
    """
    said = evaluate_with_model(model, tokenizer, ROWS, max_new_tokens=4).responses
    names = [str(tmp_path / "one.jsonl"), str(tmp_path / "two.jsonl")]
    for name, rows in zip(names, (range(20), range(20, 30)), strict=True):
        answers = [said[row] if row < 5 or row == 20 else "no" for row in rows]
        lines = [
            json.dumps({**ROWS[row], "answer": answer or "none"})
            for row, answer in zip(rows, answers, strict=True)
        ]
        Path(name).write_text("\n".join(lines))
    model_name = str(checkpoint)
    if by_engine:
        model_name = str(
            shutil.copytree(
                checkpoint, tmp_path / "bare", ignore=shutil.ignore_patterns("*.safetensors")
            )
        )
    data = [item for name in names for item in ("--data", name)]
    sampling = ["--num-samples", "4", "--temperature", "0.0001", "--k", "1,4"]
    engine = ["--engine-url", engine_url] if by_engine else []
    out = tmp_path / "results" / "eval.json"
    options = [
        "--format",
        "messages",
        "--max-new-tokens",
        "4",
        *sampling,
        *engine,
        "--out",
        str(out),
    ]
    command = [sys.executable, str(RUN_EVAL), model_name, *data, *options]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr
    record = json.loads(out.read_text())
    expected = {"all": (30, 0.2), names[0]: (20, 0.25), names[1]: (10, 0.1)}
    assert record["rows"] == {task: count for task, (count, _) in expected.items()}
    for task, (_, share) in expected.items():
        assert record["metrics"][task] == pytest.approx(
            {"exact_match": share, "pass@1": share, "pass@4": share}
        )
    by_prompt = {
        answer["prompt"]["messages"][0]["content"]: answer["response"]
        for answer in record["answers"]
    }
    assert [by_prompt[row["messages"][0]["content"]] for row in ROWS] == said
    table = [line.split() for line in done.stdout.splitlines()]
    assert table[0] == ["task", "rows", "exact_match", "pass@1", "pass@4"]
    assert table[1] == ["all", "30", "0.2000", "0.2000", "0.2000"] and len(table) == 4


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["MODEL", "--data", "none.jsonl"], 1, "error: --data none.jsonl: no such file"),
        (["./no_model", "--data", "DATA"], 1, "error: ./no_model: no such directory"),
        (["MODEL", "--data", "DATA", "--format", "csv"], 1, "error: format='csv': needs one of"),
        (["MODEL", "--data", "DATA", "--k", "1"], 2, "--k and --num-samples belong together"),
        (
            ["MODEL", "--data", "DATA", "--k", "5", "--num-samples", "4"],
            2,
            "--k 5: needs each within 1 and",
        ),
        (
            ["MODEL", "--data", "DATA", "--engine-url", "http://127.0.0.1:9"],
            1,
            "error: http://127.0.0.1:9/server_info",
        ),
    ],
)
def test_run_eval_says_what_is_wrong(
    checkpoint: Path, capsys: pytest.CaptureFixture, arguments: list[str], code: int, message: str
) -> None:
    """Goal: one line with name, value and need, no traceback. Red with the except taken out."""
    main = runpy.run_path(str(RUN_EVAL))["main"]
    data = str(RUN_EVAL.parent.parent / "configs" / "data" / "letters" / "test.jsonl")
    named = {"MODEL": str(checkpoint), "DATA": data}
    try:
        found = main([named.get(argument, argument) for argument in arguments])
    except SystemExit as end:  # of argparse
        found = end.code
    said = capsys.readouterr()
    assert found == code and message in said.err and not said.out


def test_batches_are_cut_by_tokens():
    """Goal: no batch has more padded tokens than allowed, or more rows; a row that is too long goes by itself.

    Red with the length of the first row, the shortest, in place of the last one's.
    """
    lengths = [2, 3, 3, 7, 8, 30]
    cut = list(batches_of(range(6), lengths.__getitem__, 3, 16))
    assert cut == [[0, 1, 2], [3, 4], [5]]
    assert list(batches_of(range(6), lengths.__getitem__, 2, 10**6)) == [[0, 1], [2, 3], [4, 5]]
    assert list(batches_of(range(3), [2, 9, 9].__getitem__, 3, 16)) == [[0], [1], [2]]
    assert list(batches_of([], lengths.__getitem__, 2, 9)) == []


def test_answers_do_not_depend_on_the_batches():
    """Goal: few tokens a batch give the answers of one batch. Red with rows of a batch left out."""
    model, tokenizer = tiny_model(seed=3), tiny_tokenizer()
    whole, cut = (
        evaluate_with_model(model, tokenizer, ROWS[:6], max_new_tokens=4, batch_tokens=tokens)
        for tokens in (2**17, 12)
    )
    assert cut == whole
