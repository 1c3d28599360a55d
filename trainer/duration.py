"""Lengths of time in training: "63900ba" optimizer steps, "134e9tok" tokens, "2ep" passes over the data."""

import math
import re
from dataclasses import dataclass
from fractions import Fraction
from typing import Literal

from trainer.errors import InputError

Unit = Literal["ba", "tok", "ep"]

LIMIT = 2**62  # of each unit, which 64 bits hold

_FORM = re.compile(r"\s*(\d[\d_]{0,99}(?:\.\d{1,99})?(?:[eE]\+?\d{1,3})?)\s*([a-zA-Z]+)\s*")


@dataclass(frozen=True)
class Duration:
    """A length of time: `value` >= 0, exact, in optimizer steps (ba), input tokens (tok) or epochs (ep)."""

    value: Fraction
    unit: Unit

    def steps(self, tokens_per_step: int, steps_per_epoch: int | Fraction | None) -> int:
        """The first whole number of optimizer steps that is at least this long.

        steps_per_epoch: None where the data is not known. Raises InputError if the unit needs it.
        """
        if self.unit == "ba":
            return math.ceil(self.value)
        if self.unit == "tok":
            return math.ceil(self.value / tokens_per_step)
        if steps_per_epoch is None:
            raise InputError(f"{self} needs the data to be counted in steps; give steps (ba) or tokens (tok) instead")
        steps = math.ceil(self.value * steps_per_epoch)
        if steps > LIMIT:
            raise InputError(f"{self} is more than 2**62 steps; give a shorter time")
        return steps

    def __str__(self) -> str:
        number = str(self.value.numerator) if self.value.denominator == 1 else f"{float(self.value):g}"
        return f"{number}{self.unit}"


def parse(text: str | int, name: str = "duration") -> Duration:
    """A duration from "63900ba", "134e9tok", "0.5ep" or a whole number of optimizer steps.

    name: the field, for the error. Raises InputError for any other form, a negative number, one above 2**62, or a
    fraction of a step or token.
    """
    match = _FORM.fullmatch(f"{text}ba" if isinstance(text, int) and not isinstance(text, bool) else str(text))
    if match is None or match[2].lower() not in ("ba", "tok", "ep"):
        raise InputError(f'{name}={text!r} is not a duration; write steps "63900ba", tokens "134e9tok" or epochs "2ep"')
    value, unit = Fraction(match[1].replace("_", "")), match[2].lower()
    if value > LIMIT:
        raise InputError(f"{name}={text!r} is too long; expected at most 2**62 steps, tokens or epochs")
    if unit == "ep":
        return Duration(value, "ep")
    if value.denominator != 1:
        raise InputError(f"{name}={text!r}: steps and tokens are whole numbers; fractions are for epochs (ep)")
    return Duration(value, "ba" if unit == "ba" else "tok")
