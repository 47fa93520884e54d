"""Stop strings in a text that arrives bit by bit: where it ends, and how much of it can be shown already.

Knows characters only: no tokens, no requests, no torch.
"""

from __future__ import annotations

from collections import abc


class StopStrings:
    """The text of one sequence on its way out. What was pushed comes back, in order, up to the first stop string.

    Held back is what may be the beginning of a stop string, and nothing else. A character costs a comparison with every
    stop string, amortised, however long they are.
    """

    def __init__(self, stops: abc.Sequence[str], *, is_included: bool = False) -> None:
        """`is_included`: the stop string itself is part of the text."""
        self.found: str | None = None
        self._stops, self._is_included = stops, is_included
        self._first_chars = {stop[0] for stop in stops}
        self._held = ""

    def push(self, text: str, *, may_stop: bool = True) -> str:
        """What can be shown now. With `may_stop` false no stop string that this completes counts."""
        if not self._stops:
            return text
        num_before = len(self._held)
        self._held += text
        bounds = find_stop(self._held, num_before, self._stops) if may_stop else None
        if bounds is None:
            return self._release(self._num_safe())
        start, stop = bounds
        self.found = self._held[start:stop]
        return self._release(stop if self._is_included else start)

    def flush(self) -> str:
        """What was held back, where the text ends without a stop string."""
        return "" if self.found is not None else self._release(len(self._held))

    def _num_safe(self) -> int:
        """Characters held before the first that a stop string may begin with."""
        for start, char in enumerate(self._held):
            if char in self._first_chars and any(stop.startswith(self._held[start:]) for stop in self._stops):
                return start
        return len(self._held)

    def _release(self, num_chars: int) -> str:
        text, self._held = self._held[:num_chars], self._held[num_chars:]
        return text


def find_stop(text: str, num_before: int, stops: abc.Iterable[str]) -> tuple[int, int] | None:
    """Bounds of the first stop string to be complete, the longest of several, that ends after `num_before` characters.

    So the answer does not depend on how the text was cut into tokens.
    """
    starts = ((text.find(stop, max(0, num_before - len(stop) + 1)), len(stop)) for stop in stops)
    found = [(start + length, start) for start, length in starts if start >= 0]
    if not found:
        return None
    stop, start = min(found)
    return start, stop
