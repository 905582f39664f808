"""Tokens back to text as they come: whole characters only, and nothing of a stop string."""

from __future__ import annotations

import codecs
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import tiktoken

UNKNOWN = "\N{REPLACEMENT CHARACTER}".encode()


class TextStream:
    """Turns token ids into the text that they add.

    A character that several tokens make up comes with the last of them, and what may yet become a
    stop string comes once it can't; put together, the text is the encoding's own ``decode``.

    Args:
        encoding: tiktoken's. An id that it lacks becomes U+FFFD, as broken UTF-8 does.
        stops: strings that end the text; none of them is part of it.
    """

    def __init__(self, encoding: tiktoken.Encoding, stops: Sequence[str] = ()) -> None:
        self.encoding, self.stops = encoding, [stop for stop in stops if stop]
        self.stopped = False
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._held = ""

    def add(self, token: int) -> str:
        """The text that can be shown now that this token has come; "" once stopped."""
        try:
            data = self.encoding.decode_single_token_bytes(token)
        except (KeyError, OverflowError):  # the latter for ids below 0
            data = UNKNOWN
        return self._released(self._decoder.decode(data))

    def end(self) -> str:
        """The text that was held back."""
        rest = self._released(self._decoder.decode(b"", final=True)) + self._held
        self._held = ""
        return rest

    def _released(self, text: str) -> str:
        if self.stopped:
            return ""
        self._held += text
        ends = [found for stop in self.stops if (found := self._held.find(stop)) >= 0]
        if ends:
            self.stopped = True
            shown, self._held = self._held[: min(ends)], ""
            return shown
        keep = max((_overlap(self._held, stop) for stop in self.stops), default=0)
        split = len(self._held) - keep
        shown, self._held = self._held[:split], self._held[split:]
        return shown


def decoded(encoding: tiktoken.Encoding, tokens: Iterable[int]) -> str:
    """The text of token ids, with U+FFFD for those that the encoding lacks."""
    stream = TextStream(encoding)
    return "".join(map(stream.add, tokens)) + stream.end()


def _overlap(text: str, stop: str) -> int:
    """How many characters at the end of text begin the stop string."""
    longest = min(len(text), len(stop) - 1)
    return next((n for n in range(longest, 0, -1) if text.endswith(stop[:n])), 0)
