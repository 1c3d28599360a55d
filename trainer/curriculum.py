"""Training on short pieces of long sequences first: the length of a step's sequences as a pure function of the step."""

from collections.abc import Sequence
from dataclasses import dataclass

from trainer.errors import InputError


@dataclass(frozen=True)
class LengthStage:
    """One entry of the YAML list `length_curriculum`: sequences of max_seq_len tokens up to the step `until` (a
    duration, counted from the start of the run).

    The last stage is followed by the run's own max_seq_len. A step reads the same tokens as without a curriculum,
    cut into pieces of the stage's length: so many more sequences of so much less, and data, order, epochs and tokens
    per step stay what they were.
    """

    max_seq_len: int
    until: int | str


def check_curriculum(stages: Sequence[LengthStage], max_seq_len: int) -> None:
    """InputError for a length that is 1 or not a divisor of the run's, or not below the next stage's."""
    lengths = [stage.max_seq_len for stage in stages]
    for i, (length, following) in enumerate(zip(lengths, [*lengths[1:], max_seq_len])):
        name = f"length_curriculum[{i}].max_seq_len={length}"
        if length == 1:
            raise InputError(f"{name}: a sequence of one token has none to predict; give 2 or more")
        if length < 1 or max_seq_len % length:
            raise InputError(
                f"{name} does not divide max_seq_len={max_seq_len}, whose sequences are cut into such pieces"
            )
        if length >= following:
            raise InputError(f"{name} is not below {following}, which comes next; list the stages from short to long")


def check_ends(ends: Sequence[int], names: Sequence[str], total_steps: int) -> None:
    """InputError unless the stages' ends, in steps, grow and leave steps for max_seq_len. names: of the fields."""
    for i, (end, name) in enumerate(zip(ends, names)):
        if end <= (ends[i - 1] if i else 0):
            before = f"step {ends[i - 1]}, where the stage before it ends" if i else "the first step"
            raise InputError(f"{name} is step {end}, not after {before}; leave the stage out or let it last longer")
        if end >= total_steps:
            raise InputError(
                f"{name} is step {end} and the run ends with step {total_steps}: none is left for max_seq_len; "
                "shorten the stage, or lower max_seq_len"
            )


def length_at(step: int, stages: Sequence[tuple[int, int]], max_seq_len: int) -> int:
    """Tokens of the sequences of the update after `step` updates; stages: (end in steps, length), in order."""
    return next((length for end, length in stages if step < end), max_seq_len)
