"""First-fit-decreasing: the layout of the textbook's algorithm, example by example, and what it costs."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from trainer.data.packing import first_fit_decreasing, one_each


def textbook(lengths, capacity):
    """The examples of each sequence, placed one by one."""
    sequences, room = [], []
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        place = next((j for j, free in enumerate(room) if free >= lengths[i]), len(room))
        if place == len(room):
            sequences.append([])
            room.append(capacity)
        sequences[place].append(i)
        room[place] -= lengths[i]
    return sequences


def unpacked(layout):
    return [layout.of(i).tolist() for i in range(len(layout))]


@given(st.lists(st.integers(1, 24), max_size=80))
def test_it_is_the_textbooks_layout(lengths):
    assert unpacked(first_fit_decreasing(np.array(lengths, dtype=np.int64), 24)) == textbook(lengths, 24)


def test_realistic_lengths_fill_the_sequences():
    rng = np.random.default_rng(0)
    lengths = np.clip(rng.lognormal(5, 0.9, 20_000), 5, 2048).astype(np.int64)
    layout = first_fit_decreasing(lengths, 2048)
    assert sorted(layout.examples.tolist()) == list(range(20_000))
    filled = np.add.reduceat(lengths[layout.examples], layout.starts[:-1])
    assert filled.max() <= 2048
    assert lengths.sum() / (len(layout) * 2048) > 0.99


def test_lengths_that_do_not_fit_are_refused():
    for lengths in ([0, 1], [5, 1]):
        with pytest.raises(ValueError, match=r"must be in 1\.\.4"):
            first_fit_decreasing(np.array(lengths), 4)


def test_one_each():
    assert unpacked(one_each(3)) == [[0], [1], [2]]
