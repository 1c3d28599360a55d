"""Packing: examples of many lengths laid into sequences of one length, first-fit-decreasing, exactly and in bulk."""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

IntArray = npt.NDArray[np.int64]

PADDING = -1  # the sequence id of padding


@dataclass(frozen=True)
class Layout:
    """Which examples each sequence holds: those of sequence i are examples[starts[i] : starts[i + 1]], in order."""

    examples: IntArray
    starts: IntArray

    def __len__(self) -> int:
        return len(self.starts) - 1

    def of(self, sequence: int) -> IntArray:
        return self.examples[self.starts[sequence] : self.starts[sequence + 1]]


def one_each(n: int) -> Layout:
    """Every example in a sequence of its own."""
    return Layout(np.arange(n, dtype=np.int64), np.arange(n + 1, dtype=np.int64))


def first_fit_decreasing(lengths: IntArray, capacity: int) -> Layout:
    """The longest example first, each into the first sequence that has room for it (Johnson 1974).

    lengths: (n,), each in 1..capacity. Examples of equal length keep their order, so the layout follows from the
    lengths alone. Needs at most 11/9 of the fewest sequences possible, plus one.

    Examples of one length go where they would go one by one, but at once: into the sequences with room, in order, as
    many as fit into each, then into new ones. That is one pass over the sequences per distinct length.
    """
    if len(lengths) and not 1 <= lengths.min() <= lengths.max() <= capacity:
        raise ValueError(f"lengths are {lengths.min()} to {lengths.max()}; they must be in 1..{capacity}")
    order = np.argsort(-lengths, kind="stable")
    placed = np.empty(len(lengths), dtype=np.int64)  # the sequence of each example, in the order of `order`
    room = np.empty(0, dtype=np.int64)
    done = 0
    sizes, counts = np.unique(-lengths, return_counts=True)
    for size, count in zip((-sizes).tolist(), counts.tolist()):
        fitting = room // size
        missing = max(0, count - int(fitting.sum()))
        opened = -(-missing // (capacity // size))
        room = np.concatenate([room, np.full(opened, capacity, dtype=np.int64)])
        fitting = np.concatenate([fitting, np.full(opened, capacity // size, dtype=np.int64)])
        taken = np.clip(count - (np.cumsum(fitting) - fitting), 0, fitting)
        room -= taken * size
        placed[done : done + count] = np.repeat(np.arange(len(room)), taken)
        done += count
    by_sequence = np.argsort(placed, kind="stable")
    ends = np.cumsum(np.bincount(placed, minlength=len(room)), dtype=np.int64)
    return Layout(order[by_sequence].astype(np.int64), np.concatenate([np.zeros(1, np.int64), ends]))
