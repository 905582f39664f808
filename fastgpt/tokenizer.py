"""GPT-2's byte-pair encoding, through tiktoken."""

from __future__ import annotations

import queue
import textwrap
import threading
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import tiktoken


END_OF_TEXT = "<|endoftext|>"


class EncodingError(RuntimeError):
    """tiktoken's table is neither in its cache nor to be had; the message, one line, says why and
    what to do, and ``reason`` only why.
    """

    def __init__(self, reason: str) -> None:
        self.reason = reason
        super().__init__(
            f"tiktoken cannot fetch GPT-2's table of tokens ({reason}); without a connection, let "
            "TIKTOKEN_CACHE_DIR name a folder that tiktoken has filled elsewhere"
        )


def gpt2_encoding(timeout: float = 15.0) -> tiktoken.Encoding:
    """Return tiktoken's "gpt2" encoding (50,257 tokens).

    tiktoken downloads its table (1.5 MB) at the first use and keeps it in `TIKTOKEN_CACHE_DIR`,
    or else in the system's temporary folder. Raises `EncodingError` where that fails or
    takes more than `timeout` seconds.
    """
    outcome: queue.SimpleQueue[tiktoken.Encoding | Exception] = queue.SimpleQueue()

    def load() -> None:
        try:
            import tiktoken

            outcome.put(tiktoken.get_encoding("gpt2"))
        except Exception as error:  # tiktoken lets its transport's and its parser's errors through
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
