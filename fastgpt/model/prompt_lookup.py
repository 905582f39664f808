"""Guess and check: several tokens a pass where a text repeats itself.

The tokens that followed the last few where these stood before are taken for the next ones, as in
prompt lookup decoding (Saxena, github.com/apoorvumang/prompt-lookup-decoding), and run in one pass
with the last token. A guess that the model would have chosen itself saves a pass; the first that it
would not ends them. So the tokens are those of one pass each: a few rows of a pass on the CPU have
the same bits as one (csrc/gemm.h).
"""

from __future__ import annotations

import time
from collections.abc import Iterable

MOST = 7  # guesses a pass: with the token before them, as many queries as the attention takes apart
LONGEST = 3  # tokens that must have stood there before, at best; one at least
_SHARE = 0.02  # of the time without guesses, which those that fail may cost
_FIRST = 0.25  # passes that may be risked at the start ..
_MOST_CREDIT = 1.0  # .. and once guesses have saved some


class PromptLookup:
    """What is guessed, and whether guessing pays.

    Credit is counted in passes of one token: each adds a share of itself, each good guess the pass
    it saves, and a pass with guesses takes what it lasted longer. What a guess takes is measured.

    Args:
        tokens: the sequence so far.
    """

    def __init__(self, tokens: Iterable[int]) -> None:
        self.tokens: list[int] = []
        self._behind: dict[tuple[int, ...], int] = {}  # n tokens -> where the next one stands
        self._length, self._credit = 3, _FIRST
        self._seconds, self._each = 0.0, 0.1  # of a pass of one token; what a guess adds to it
        for token in tokens:
            self.add(token)

    def add(self, token: int) -> None:
        """Joins the sequence."""
        # Only now do tokens stand behind the last ones.
        end = len(self.tokens)
        for n in range(1, min(LONGEST, end) + 1):
            self._behind[tuple(self.tokens[end - n :])] = end
        self.tokens.append(token)

    def guess(self, room: int) -> list[int]:
        """The next tokens, at most so many; none where nothing like it was seen or the credit is
        used up.
        """
        most = min(room, self._length, int(self._credit / self._each))
        if most < 1:
            return []
        for n in range(min(LONGEST, len(self.tokens)), 0, -1):
            at = self._behind.get(tuple(self.tokens[-n:]))
            if at is not None:
                ahead = self.tokens[at : at + most]
                while len(ahead) < most:  # a text that goes round: on from what was guessed
                    ahead += ahead[: most - len(ahead)]
                return ahead
        return []

    def passed(self, guesses: int, since: float) -> None:
        """Accounts for a pass that began at this time of the performance counter."""
        seconds = time.perf_counter() - since
        if not guesses:
            # The least counts, a little forgetful: other work on the machine only makes it longer.
            self._seconds = min(seconds, 1.01 * self._seconds or seconds)
            self._earn(_SHARE)
        elif self._seconds:
            # No more than the passes it might have saved, whatever interrupted it.
            cost = min(max(seconds / self._seconds - 1, 0.0), guesses)
            self._each += (max(cost / guesses, 0.005) - self._each) / 4
            self._credit -= cost

    def checked(self, good: int) -> None:
        """Of the last pass's guesses so many were good."""
        self._length = min(good + 2, MOST)
        self._earn(good)

    def _earn(self, passes: float) -> None:
        self._credit = min(self._credit + passes, _MOST_CREDIT)
