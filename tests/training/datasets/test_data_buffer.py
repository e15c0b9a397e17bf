"""DataBuffer: order, wrapping, exact resume."""

import json
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rollouts.data_formats.row import DataError
from rollouts.training.datasets.data_buffer import DataBuffer

PROMPTS = [f"prompt {index}" for index in range(7)]


def test_each_epoch_has_every_prompt_in_its_own_order() -> None:
    """Goal: epochs are permutations by (seed + epoch). Red when every epoch reused the first one's order."""
    buffer = DataBuffer(PROMPTS, seed=42)
    epochs = [buffer.get_prompts(7) for _ in range(3)]
    for epoch, prompts in enumerate(epochs):
        expected = list(PROMPTS)
        order = list(range(7))
        random.Random(42 + epoch).shuffle(order)
        assert prompts == [expected[index] for index in order]
    assert epochs[0] != epochs[1] != epochs[2]


def test_the_seed_decides() -> None:
    """Goal: the same seed gives the same order, another one another. Red with an unseeded shuffle."""
    assert DataBuffer(PROMPTS, seed=1).get_prompts(7) == DataBuffer(PROMPTS, seed=1).get_prompts(7)
    assert DataBuffer(PROMPTS, seed=1).get_prompts(7) != DataBuffer(PROMPTS, seed=2).get_prompts(7)


@settings(max_examples=60)
@given(
    sizes=st.lists(st.integers(0, 20), max_size=8),
    rest=st.integers(0, 30),
    count=st.integers(1, 7),
    seed=st.integers(0, 2**32 - 1),
    given_again=st.booleans(),
)
def test_resume_gives_exactly_the_prompts_that_would_have_come(
    sizes: list[int], rest: int, count: int, seed: int, given_again: bool
) -> None:
    """Goal: traps.md, resume skips or repeats prompts: saved anywhere, at and across the ends of epochs too.

    Red when load_state kept the new buffer's seed, when it forgot the epoch, and when an epoch's end was not wrapped.
    """
    buffer = DataBuffer(PROMPTS[:count], seed=seed)
    for size in sizes:
        assert len(buffer.get_prompts(size)) == size
    state = json.loads(json.dumps(buffer.save_state()))
    resumed = DataBuffer(PROMPTS[:count], seed=seed if given_again else None)
    resumed.get_prompts(sum(sizes) // 2)  # wherever it stood
    resumed.load_state(state)
    assert resumed.get_prompts(rest) == buffer.get_prompts(rest)
    assert resumed.save_state() == buffer.save_state()


def test_a_state_of_another_seed_is_refused() -> None:
    """Goal: traps.md, a restore that shuffles with the wrong seed. Red without the check: other prompts came."""
    state = DataBuffer(PROMPTS, seed=1).save_state()
    buffer = DataBuffer(PROMPTS, seed=2)
    with pytest.raises(
        DataError,
        match=r"saved with seed 1, this buffer was given seed 2.* Fix: the seed that the run",
    ):
        buffer.load_state(state)
    assert buffer.get_prompts(7) == DataBuffer(PROMPTS, seed=2).get_prompts(7)


def test_batch_sizes_do_not_matter() -> None:
    """Goal: one stream, however it is cut. Red when the rest of an epoch was thrown away at its end."""
    one, many = DataBuffer(PROMPTS, seed=3), DataBuffer(PROMPTS, seed=3)
    assert one.get_prompts(50) == [prompt for _ in range(10) for prompt in many.get_prompts(5)]


ROWS = st.one_of(
    st.text(max_size=3),
    st.fixed_dictionaries({"messages": st.lists(st.text(max_size=2), max_size=2)}),
)


@settings(max_examples=60)
@given(prompts=st.lists(ROWS, min_size=1, max_size=5), data=st.data())
def test_a_swapped_edited_or_reordered_data_set_is_noticed(
    prompts: list, data: st.DataObject
) -> None:
    """Goal: NeMo-RL#2519, for any two data sets. Red with a fingerprint of the length alone, or of sorted prompts.

    Red too when prompts were joined without a separator: ["a", "b"] and ["ab"] were the same.
    """
    other = data.draw(
        st.one_of(
            st.lists(ROWS, min_size=1, max_size=5),
            st.permutations(prompts),
            st.just([*prompts, prompts[-1]]),
            st.just([*prompts[:-1], "".join(map(str, prompts))]),
        )
    )
    state, buffer = DataBuffer(prompts, seed=0).save_state(), DataBuffer(other, seed=0)
    if other == prompts:
        buffer.load_state(state)
    else:
        with pytest.raises(DataError, match="saved over other prompts"):
            buffer.load_state(state)


@pytest.mark.parametrize("change", [{"offset": 7}, {"offset": -1}, {"epoch": -1}])
def test_a_state_that_cannot_be_is_refused(change: dict[str, int]) -> None:
    """Goal: a damaged state never gives prompts. Red without the range check."""
    buffer = DataBuffer(PROMPTS, seed=0)
    with pytest.raises(DataError, match="outside of 7 prompts"):
        buffer.load_state({**buffer.save_state(), **change})
    with pytest.raises(DataError, match=r"lacks \['epoch'\]"):
        buffer.load_state(
            {key: value for key, value in buffer.save_state().items() if key != "epoch"}
        )


def test_no_prompts_is_an_error() -> None:
    """Goal: no endless loop over nothing. Red (hung) without the check."""
    with pytest.raises(DataError, match="no prompts"):
        DataBuffer([])
