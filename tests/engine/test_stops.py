"""Where a text ends by its stop strings, and that nothing is shown too early or held back too long."""

from __future__ import annotations

import random
from typing import Any

import pytest

from dsv2.engine.stops import StopStrings, find_stop


def first_stop(text: str, stops: list[str]) -> tuple[int, int]:
    """By the definition: bounds of the stop string that is complete first, the longest of several."""
    for stop in range(1, len(text) + 1):
        starts = [stop - len(each) for each in stops if text[:stop].endswith(each)]
        if starts:
            return min(starts), stop
    return len(text), len(text)


@pytest.mark.parametrize("is_included", [False, True])
def test_shown_text_is_that_before_the_first_stop_string_however_it_arrives(is_included: bool) -> None:
    num_found = 0
    for seed in range(2000):
        rng = random.Random(seed)
        text = "".join(rng.choices("aab", k=rng.randint(0, 12)))
        stops = ["".join(rng.choices("abc", k=rng.randint(1, 5))) for _ in range(rng.randint(0, 3))]
        strings, shown, rest = StopStrings(stops, is_included=is_included), "", text
        while rest and strings.found is None:
            size = rng.randint(1, 4)
            shown += strings.push(rest[:size])
            rest = rest[size:]
            held = text[len(shown) : len(text) - len(rest)]
            assert strings.found or not held or any(stop.startswith(held) for stop in stops), "held without need"
        start, stop = first_stop(text, stops)
        assert shown + strings.flush() == text[: stop if is_included else start], f"seed {seed}"
        assert strings.found == (text[start:stop] or None)
        num_found += strings.found is not None
    assert 400 < num_found < 1600


class Compared(str):
    """A stop string that counts how often it is compared."""

    num_comparisons = 0

    def startswith(self, *args: Any) -> bool:
        Compared.num_comparisons += 1
        return super().startswith(*args)


def test_a_character_costs_few_comparisons_however_long_stop_strings_are() -> None:
    text = ("a" * 999 + "c") * 5
    strings = StopStrings([Compared("a" * 1000 + "b")])
    assert "".join(map(strings.push, text)) + strings.flush() == text
    assert Compared.num_comparisons <= 2 * len(text)


@pytest.mark.parametrize(
    ("text", "num_before", "stops", "bounds"),
    [
        ("abc", 0, ["abc", "b"], (1, 2)),
        ("abc", 0, ["bc", "c"], (1, 3)),
        ("abcb", 2, ["b"], (3, 4)),
        ("abab", 3, ["ab"], (2, 4)),
        ("ab", 2, ["ab"], None),
        ("", 0, ["a"], None),
        ("abc", 0, [], None),
    ],
)
def test_the_first_stop_string_to_be_complete_is_found(
    text: str, num_before: int, stops: list[str], bounds: tuple[int, int] | None
) -> None:
    assert find_stop(text, num_before, stops) == bounds
