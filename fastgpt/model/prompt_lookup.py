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
LONGEST = 12  # tokens that are compared with earlier ones
_SHARE = 0.02  # of the time without guesses, which those that fail may cost
_FIRST = 0.25  # passes that may be risked at the start ..
_MOST_CREDIT = 1.0  # .. and once guesses have saved some


class PromptLookup:
    """What is guessed, and whether guessing pays.

    The longer the stretch that stood there before, the likelier is its next token the next one
    here. How often that held is counted for each length, over the prompt and what follows it. A
    pass takes guesses for as long as the chance that all are good, by these counts, is above what
    one more of them takes.

    Credit is counted in passes of one token: each adds a share of itself, each good guess the pass
    it saves, and a pass with guesses takes what it lasted longer. What a guess takes is measured.

    Args:
        tokens: the sequence so far.
    """

    def __init__(self, tokens: Iterable[int]) -> None:
        self.tokens: list[int] = []
        self._behind: dict[tuple[int, ...], int] = {}  # n tokens -> where the next one stands
        self._seen = [1.0] * (LONGEST + 1)  # times that n tokens at most stood there before ..
        self._held = [0.5] * (LONGEST + 1)  # .. and the same token came next
        self._credit = _FIRST
        self._seconds, self._each = 0.0, 0.1  # of a pass of one token; what a guess adds to it
        for token in tokens:
            self.add(token)

    def add(self, token: int) -> None:
        """Joins the sequence."""
        n, expected = self._next(self.tokens)
        self._seen[n] += 1
        self._held[n] += token == expected
        # Only now do tokens stand behind the last ones.
        end = len(self.tokens)
        for n in range(1, min(LONGEST, end) + 1):
            self._behind[tuple(self.tokens[end - n :])] = end
        self.tokens.append(token)

    def _next(self, tokens: list[int]) -> tuple[int, int | None]:
        """How many of the last tokens stood before what was seen last, and that token."""
        n, found = 0, None
        while n < min(LONGEST, len(tokens)):
            at = self._behind.get(tuple(tokens[-n - 1 :]))
            if at is None:
                break
            n, found = n + 1, self.tokens[at]
        return n, found

    def guess(self, room: int) -> list[int]:
        """The next tokens, at most so many; none where nothing like it was seen, where that told
        little so far, or where the credit is used up.
        """
        most = min(room, MOST, int(self._credit / self._each))
        ahead, chance = self.tokens[-LONGEST:], 1.0
        guesses: list[int] = []
        while len(guesses) < most:
            n, token = self._next(ahead)
            chance *= self._held[n] / self._seen[n]
            if token is None or chance < self._each:
                break
            guesses.append(token)
            ahead.append(token)
        return guesses

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
        self._earn(good)

    def _earn(self, passes: float) -> None:
        self._credit = min(self._credit + passes, _MOST_CREDIT)
