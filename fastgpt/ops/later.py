"""Numbers on their way from a GPU to the host, which waits for them only if it asks too early."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class Later:
    """The numbers of a tensor [n]. Made inside a captured CUDA graph it breaks the capture."""

    def __init__(self, numbers: Tensor) -> None:
        self._numbers, self._copied = numbers.detach(), None
        if numbers.is_cuda:
            self._numbers = self._numbers.to("cpu", non_blocking=True)  # into pinned memory
            self._copied = torch.cuda.Event()
            self._copied.record(torch.cuda.current_stream(numbers.device))

    def there(self) -> bool:
        """Whether ``read`` would not wait."""
        return self._copied is None or bool(self._copied.query())

    def read(self) -> list[Any]:
        """The numbers; waits for the copy, and for nothing that was queued behind it."""
        if self._copied is not None:
            self._copied.synchronize()
        return self._numbers.tolist()
