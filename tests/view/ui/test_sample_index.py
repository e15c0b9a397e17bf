"""The index of rollouts.jsonl: what it holds, when it is made anew, and what is chosen by it."""

import itertools
import json
import random
from pathlib import Path
from typing import Any

import numpy
import pytest

from rollouts.remote.ui_builder import Builder
from rollouts.remote.ui_runs import KnownRuns
from rollouts.run_dir import RunDir, append_jsonl
from rollouts.view.ui import sample_index
from rollouts.view.ui.desk import Desk
from rollouts.view.ui.run_answers import chart, run_summary
from rollouts.view.ui.run_source import PageError
from rollouts.view.ui.sample_index import cache_of, read_columns, read_head, update
from rollouts.view.ui.sample_query import Samples, brief, read_filter, read_lines, search
from tests.remote.hosts import wait_for
from tests.view.runs import rollout_row, write_run


def indexed(file: Path) -> Samples:
    cache = cache_of(file)
    update(file, cache)
    head = read_head(cache, file)
    assert head is not None
    columns = read_columns(cache, head)
    assert columns is not None
    return Samples(columns, head.finish)


def rows_of(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def chosen_rows(file: Path, samples: Samples, **asked: str) -> list[dict[str, Any]]:
    positions = [int(at) for at in samples.chosen(read_filter(asked))]
    return [row for row in read_lines(file, samples, positions) if row is not None]


def made(path: Path, count: int = 400) -> Path:
    """Write samples with numbers that differ, in groups of four, every third group without contrast."""
    draw, file = random.Random(0), RunDir(path).rollouts
    path.mkdir(parents=True, exist_ok=True)
    for place in range(count):
        step, group = 1 + place // 40, place // 4 % 10
        row = rollout_row(step, place, draw, 4) | {"group": group, "prompt_id": f"p{group}"}
        row |= {"reward": 0.7 if group % 3 == 0 else draw.choice([0.0, 0.3, 0.7, 1.0])}
        append_jsonl(file, row | {"finish_reason": draw.choice(["stop", "length"])})
    return file


def test_filters_choose_what_the_lines_say(tmp_path: Path) -> None:
    """Goal: each filter and order gives exactly the rows that the same words pick out of the parsed file."""
    file = made(tmp_path)
    rows, samples = rows_of(file), indexed(file)
    assert samples.count == len(rows) == 400
    pick = {
        "reward_min": lambda row: row["reward"] >= 0.7,
        "reward_max": lambda row: row["reward"] <= 0.3,
        "step_min": lambda row: row["step"] >= 4,
        "length_max": lambda row: row["response_length"] <= 5,
    }
    for (name, fits), value in zip(pick.items(), ("0.7", "0.3", "4", "5"), strict=True):
        found = chosen_rows(file, samples, order="step", **{name: value})
        assert found == [row for row in rows if fits(row)] != [], name
    assert chosen_rows(file, samples, order="step", finish="length") == [
        row for row in rows if row["finish_reason"] == "length"
    ]
    assert chosen_rows(file, samples, order="step", prompt="p4") == [
        row for row in rows if row["prompt_id"] == "p4"
    ]
    best = chosen_rows(file, samples, order="-reward")
    assert best == sorted(rows, key=lambda row: -row["reward"])
    newest = chosen_rows(file, samples)
    assert newest == sorted(rows, key=lambda row: -row["step"])


def test_groups_without_contrast_are_those_of_one_reward(tmp_path: Path) -> None:
    """Goal: `contrast=no` gives the samples of groups whose rewards are all the same. Red with the rewards of the
    whole step compared."""
    file = made(tmp_path)
    samples = indexed(file)
    groups: dict[tuple[int, int], set[float]] = {}
    for row in rows_of(file):
        groups.setdefault((row["step"], row["group"]), set()).add(row["reward"])
    flat = [row for row in rows_of(file) if len(groups[row["step"], row["group"]]) == 1]
    assert chosen_rows(file, samples, order="step", contrast="no") == flat and 0 < len(flat) < 400
    assert samples.group_of(5) == [4, 5, 6, 7]


def test_an_index_grows_with_its_file(tmp_path: Path) -> None:
    """Goal: after an append only the new lines are read, and a torn last line waits for its end. Red with the torn
    line counted as damaged."""
    file = made(tmp_path, 40)
    assert indexed(file).count == 40
    line = json.dumps(rollout_row(9, 0, random.Random(0), 4))
    with file.open("a") as stream:
        stream.write(line[:50])
    assert indexed(file).count == 40
    with file.open("a") as stream:
        stream.write(line[50:] + "\nno sample\n")
    before = sample_index._lines

    def lines(stream: Any) -> Any:
        assert stream.tell() > 1000, "it began anew"
        return before(stream)

    sample_index._lines = lines
    try:
        samples = indexed(file)
    finally:
        sample_index._lines = before
    head = read_head(cache_of(file), file)
    assert samples.count == 41 and head is not None and head.damaged == 1
    assert head.bytes == file.stat().st_size


@pytest.mark.parametrize(
    "fault", ["version", "cut", "flipped", "not json", "other file", "shorter"]
)
def test_an_index_that_does_not_fit_is_made_anew(tmp_path: Path, fault: str) -> None:
    """Goal: an older, a damaged and another file's index are never believed. Red with the checks of version,
    sums and tail taken out in turn."""
    file = made(tmp_path, 80)
    right = indexed(file).columns
    cache = cache_of(file)
    head, column = cache / "head.json", cache / "reward"
    if fault == "version":
        head.write_text(head.read_text().replace('"version": 1', '"version": 0'))
    elif fault == "cut":
        column.write_bytes(column.read_bytes()[:-8])
    elif fault == "flipped":
        column.write_bytes(bytes([column.read_bytes()[0] ^ 1]) + column.read_bytes()[1:])
    elif fault == "not json":
        head.write_text("{")
    elif fault == "other file":
        file.write_text(file.read_text().replace("answer 2", "answer X"))
    else:
        file.write_text("".join(file.read_text().splitlines(keepends=True)[:50]))
    found = read_head(cache, file)
    assert found is None or read_columns(cache, found) is None
    samples = indexed(file)
    assert samples.count == (50 if fault == "shorter" else 80)
    assert numpy.array_equal(samples.columns["reward"], right["reward"][: samples.count])


def test_what_a_resumed_run_wrote_again_counts_once(tmp_path: Path) -> None:
    """Goal: of steps that stand twice the later lines count, of a step that was written in part too. Red with every
    line counted, and with a fall of the step alone seen."""
    file, draw = RunDir(tmp_path).rollouts, random.Random(0)
    for step, life in ((1, "a"), (2, "a"), (3, "a"), (2, "b"), (3, "b")):
        append_jsonl(
            file, *({**rollout_row(step, place, draw, 4), "response": life} for place in range(8))
        )
    append_jsonl(file, *({**rollout_row(3, place, draw, 4), "response": "c"} for place in range(8)))
    samples = indexed(file)
    found = chosen_rows(file, samples, order="step")
    assert [(row["step"], row["response"]) for row in found] == [
        *[(1, "a")] * 8,
        *[(2, "b")] * 8,
        *[(3, "c")] * 8,
    ]


def test_a_prompt_through_training(tmp_path: Path) -> None:
    """Goal: the mean reward of a prompt at each step is that of its lines."""
    file = made(tmp_path)
    samples, rows = indexed(file), rows_of(file)
    history = samples.through_training(4)
    by_step: dict[int, list[float]] = {}
    for row in rows:
        if row["prompt_id"] == rows[4]["prompt_id"]:
            by_step.setdefault(row["step"], []).append(row["reward"])
    assert [(point["step"], point["samples"]) for point in history] == [
        (s, len(r)) for s, r in by_step.items()
    ]
    assert [point["reward"] for point in history] == pytest.approx(
        [sum(r) / len(r) for r in by_step.values()]
    )
    assert rows[samples.at(history[2]["offset"])]["step"] == history[2]["step"]


def test_a_search_goes_on_where_time_was_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Goal: a text is found in prompts and responses, whatever its case and its letters, not in token ids; a search
    that runs out of time says where to go on, and finds the same in all. Red with the raw line searched alone: every
    line has a 5 among its token ids."""
    file = made(tmp_path, 120)
    append_jsonl(
        file, {**rollout_row(9, 0, random.Random(0), 4), "response": 'Größe "fünf" 5\nEND'}
    )
    samples = indexed(file)
    chosen = samples.chosen(read_filter({"order": "step"}))

    def all_found(text: str) -> list[int]:
        found, begin = [], 0
        while begin is not None:
            part = search(file, samples, chosen, text, begin=begin, most=10)
            found, begin = found + part.positions, part.next
        return found

    assert all_found("GRÖßE") == all_found('"FÜNF"') == all_found("fünf") == [120]
    assert all_found("5\nend") == [120]
    expected = [
        at
        for at, row in enumerate(rows_of(file))
        if "5" in row["response"] + row["prompt"]["question"]
    ]
    assert all_found("5") == expected
    monkeypatch.setattr("rollouts.view.ui.sample_query.SEARCH_S", -1.0)
    assert all_found("answer 2.") == [
        at for at, row in enumerate(rows_of(file)) if "answer 2." in row["response"]
    ]


@pytest.mark.parametrize(
    "asked", [{"reward_min": "much"}, {"order": "size"}, {"contrast": "perhaps"}]
)
def test_a_filter_that_means_nothing_is_refused(asked: dict[str, str]) -> None:
    """Goal: the message names the word. Red with it passed over."""
    with pytest.raises(PageError, match=next(iter(asked))):
        read_filter(asked)


def test_odd_lines_cost_themselves_alone(tmp_path: Path) -> None:
    """Goal: lines without a reward, with numbers that no column holds, and of no JSON are counted; a link to no sample
    says so; a sample that was overwritten is shown as gone."""
    file = made(tmp_path, 8)
    row = rollout_row(9, 0, random.Random(0), 4)
    with file.open("a") as stream:
        for odd in ({"step": 2**40}, {"group": -1}, {"reward": "x"}, {"step": None}):
            stream.write(json.dumps(row | odd) + "\n")
        stream.write('{"torn\n\n[1]\n')
    samples = indexed(file)
    head = read_head(cache_of(file), file)
    assert samples.count == 8 and head is not None and head.damaged == 6
    with pytest.raises(PageError, match="no sample at byte 3"):
        samples.at(3)
    assert brief(None, samples, 0)["gone"] is True


def test_nothing_is_written_into_the_run(tmp_path: Path) -> None:
    """Goal: an index lies in the home's cache."""
    run = write_run(tmp_path / "a", steps=3)
    before = sorted(str(path) for path in tmp_path.rglob("*"))
    indexed(run.rollouts)
    assert sorted(str(path) for path in tmp_path.rglob("*")) == before


def test_the_first_look_shows_samples(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Goal: a run that was never looked at shows its first samples at once, before the process that indexes has begun;
    the next looks show more. Red with that process alone."""
    file = made(tmp_path / "run", count=1000)
    now = itertools.count()
    with monkeypatch.context() as patched:
        patched.setattr(sample_index.time, "monotonic", lambda: next(now) / 10_000)
        update(file, cache_of(file), seconds=0.05)
    head = read_head(cache_of(file), file)
    assert head is not None and 0 < head.records < 1000
    assert indexed(file).count == 1000


def test_a_chart_is_offered_once_it_can_be_drawn(tmp_path: Path) -> None:
    """Goal: a first sample of how busy the machine is, which does not know a use, offers no chart of it; the next one
    does. Red with a chart for any sample: a page of a run that began a moment ago asked for what was refused."""
    run = write_run(tmp_path / "run")
    desk = Desk(KnownRuns([run.path]), Builder(None))
    try:
        for step, cpu in ((41, None), (42, 1.5)):
            process = {"name": "trainer-0", "cpu": cpu, "memory_gib": 0.5}
            append_jsonl(run.gpu, {"time": 1.0, "stage": "rl", "gpus": [], "processes": [process]})
            append_jsonl(run.metrics, {"time": 1.0, "stage": "rl", "step": step})
            others = run_summary(desk, "run")["stages"][-1]["others"]
            assert ("usage" in others) == (cpu is not None)
            assert all(chart(desk, ["run"], "rl", f"chart:{name}") for name in others)
    finally:
        desk.close()


def test_a_desk_shows_what_there_is_at_once(tmp_path: Path) -> None:
    """Goal: the first answer about samples has some, and it is told that more come; then all. Red without the part
    that the server indexes itself."""
    file = write_run(tmp_path / "run").rollouts
    desk = Desk(KnownRuns([file.parent]), Builder(None))
    try:
        found = desk.samples("run")
        assert found.samples.count > 0 and found.total == file.stat().st_size
        wait_for(lambda: desk.samples("run").samples.count == 320, "the whole index")
        append_jsonl(file, rollout_row(99, 0, random.Random(0), 4))
        wait_for(lambda: desk.samples("run").samples.count == 321, "the new sample")
    finally:
        desk.close()
