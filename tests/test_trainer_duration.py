"""Durations: every unit, exact arithmetic, and what is refused."""

from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trainer.duration import Duration, parse
from trainer.errors import InputError


@pytest.mark.parametrize(
    ("text", "value", "unit"),
    [
        ("63900ba", 63900, "ba"),
        (100, 100, "ba"),
        (0, 0, "ba"),
        ("134e9tok", 134_000_000_000, "tok"),
        ("1.5e3tok", 1500, "tok"),
        ("1_000ba", 1000, "ba"),
        ("2ep", 2, "ep"),
        ("0.1ep", Fraction(1, 10), "ep"),
        (" 5 BA ", 5, "ba"),
    ],
)
def test_forms(text: str | int, value: int, unit: str) -> None:
    assert parse(text) == Duration(Fraction(value), unit)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "ba",
        "10",
        "ten ba",
        "-5ba",
        -5,
        "5sec",
        "1e-3tok",
        "0.5ba",
        "1.5tok",
        "5ba5",
        True,
        "1e9999ep",
        "1e999ba",
        "5e18tok",
        10**30,
        "9" * 5000 + "ba",
    ],
)
def test_refused(text: str | int) -> None:
    with pytest.raises(InputError, match="max_duration="):
        parse(text, "max_duration")


def test_more_steps_than_64_bits_are_refused() -> None:
    assert parse(f"{2**62}ba").steps(1, 1) == 2**62
    with pytest.raises(InputError, match=r"max_duration=.* is too long; expected at most 2\*\*62"):
        parse(f"{2**62 + 1}ba", "max_duration")
    with pytest.raises(InputError, match=r"1000000000000000ep is more than 2\*\*62 steps"):
        Duration(Fraction(10**30, 10**15), "ep").steps(1, 10**6)


def test_tokens_round_up_to_whole_steps() -> None:
    assert parse("1000tok").steps(100, None) == 10
    assert parse("1001tok").steps(100, None) == 11
    assert parse("0tok").steps(100, None) == 0


def test_epochs_need_the_data() -> None:
    assert parse("2ep").steps(1, 50) == 100
    assert parse("0.1ep").steps(1, 55) == 6
    with pytest.raises(InputError, match="2ep needs the data"):
        parse("2ep").steps(1, None)


@given(st.integers(0, 10**18), st.integers(1, 10**9))
def test_the_least_number_of_steps_that_is_long_enough(tokens: int, per_step: int) -> None:
    steps = parse(f"{tokens}tok").steps(per_step, None)
    assert steps * per_step >= tokens > (steps - 1) * per_step


@given(st.integers(0, 10**12), st.sampled_from(["ba", "tok", "ep"]))
def test_text_round_trip(number: int, unit: str) -> None:
    assert str(parse(f"{number}{unit}")) == f"{number}{unit}"
