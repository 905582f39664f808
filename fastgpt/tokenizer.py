"""GPT-2's byte-pair encoding, through tiktoken: text to tokens, and tokens back as they arrive."""

from __future__ import annotations

import codecs
import queue
import textwrap
import threading
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import tiktoken

END_OF_TEXT = "<|endoftext|>"
UNKNOWN = "\N{REPLACEMENT CHARACTER}".encode()


class EncodingError(RuntimeError):
    """tiktoken's table is neither cached nor downloadable.

    The message is one line: why, and what to do. ``reason`` is the why alone.
    """

    def __init__(self, reason: str) -> None:
        self.reason = reason
        super().__init__(
            f"tiktoken cannot download GPT-2's token table ({reason}); without a connection, set "
            "TIKTOKEN_CACHE_DIR to a folder that tiktoken has filled on another machine"
        )


def gpt2_encoding(timeout: float = 15.0) -> tiktoken.Encoding:
    """Returns tiktoken's "gpt2" encoding (50,257 tokens).

    tiktoken downloads its table (1.5 MB) on first use and keeps it in ``TIKTOKEN_CACHE_DIR``, or
    in the system's temporary folder if that is not set.

    Raises:
        EncodingError: the download fails, or takes more than ``timeout`` seconds.
    """
    outcome: queue.SimpleQueue[tiktoken.Encoding | Exception] = queue.SimpleQueue()

    def load() -> None:
        try:
            import tiktoken

            outcome.put(tiktoken.get_encoding("gpt2"))
        except Exception as error:  # of any kind: tiktoken passes on those of its HTTP client
            outcome.put(error)

    # tiktoken sets no time limit on the download: a network that drops packets would hang it.
    threading.Thread(target=load, name="tiktoken", daemon=True).start()
    try:
        result = outcome.get(timeout=timeout)
    except queue.Empty:
        raise EncodingError(f"no answer within {timeout:g} s") from None
    if isinstance(result, Exception):
        reason = textwrap.shorten(f"{type(result).__name__}: {result}", width=100)
        raise EncodingError(reason) from result
    return result


class TextStream:
    """Turns token ids into text, one token at a time.

    A character made of several tokens is returned with the last of them. Text that may be the
    beginning of a stop string is held back until that is decided. Joined, the pieces are what the
    encoding's own ``decode`` returns.

    Args:
        encoding: tiktoken's. An id that it does not have becomes U+FFFD, as broken UTF-8 does.
        stops: strings that end the text; they are not part of it.
    """

    def __init__(self, encoding: tiktoken.Encoding, stops: Sequence[str] = ()) -> None:
        self.encoding, self.stops = encoding, [stop for stop in stops if stop]
        self.stopped = False
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._held = ""

    def add(self, token: int) -> str:
        """Takes one token and returns the text that can be shown now; "" once stopped."""
        try:
            data = self.encoding.decode_single_token_bytes(token)
        except (KeyError, OverflowError):  # OverflowError: an id below 0
            data = UNKNOWN
        return self._released(self._decoder.decode(data))

    def end(self) -> str:
        """Returns the text that is still held back."""
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
    """The text of token ids, with U+FFFD for ids that the encoding does not have."""
    stream = TextStream(encoding)
    return "".join(map(stream.add, tokens)) + stream.end()


def _overlap(text: str, stop: str) -> int:
    """The length of the longest beginning of the stop string that the text ends with."""
    longest = min(len(text), len(stop) - 1)
    return next((n for n in range(longest, 0, -1) if text.endswith(stop[:n])), 0)
