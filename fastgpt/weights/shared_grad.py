"""Parameters that are views of a larger parameter, and share its gradient too.

Each part is a leaf, so a module can have it and an optimiser can step it. Hooks make the .grad of
the parts views of the whole's .grad: a gradient that reaches either shows in both. If the owner
of one sets it to None, it counts as zero for the other in the next backward pass.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable, MutableMapping, Sequence

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

Cut = Callable[[Tensor], Tensor]  # from a tensor of the whole's shape to a view of it
_LINKS: MutableMapping[Tensor, _Link] = WeakTensorKeyDictionary()  # by their wholes


def shared_parts(whole: nn.Parameter, cuts: Sequence[Cut]) -> list[nn.Parameter]:
    """Parameters that are these views of the whole; a second call returns the same ones."""
    link = _LINKS.get(whole)
    if link is None or not link.is_of(whole, cuts):
        link = _LINKS[whole] = _Link(whole, cuts)
    return link.parts


class _Link:
    """Keeps the gradients of the whole and its parts in the same memory."""

    def __init__(self, whole: nn.Parameter, cuts: Sequence[Cut]) -> None:
        self._whole, self._cuts = weakref.ref(whole), cuts
        data = whole.detach()
        self.parts = [nn.Parameter(cut(data), whole.requires_grad) for cut in cuts]
        # For parts that are columns, the whole's gradient is column-major, so that theirs is dense.
        self._across = any(not p.is_contiguous() and not p.mT.is_contiguous() for p in self.parts)
        afters = [functools.partial(self._after_part, cut=cut) for cut in cuts]
        self._hook(whole, self._before_whole, self._after_whole)
        for part, after in zip(self.parts, afters, strict=True):
            self._hook(part, self._before_part, after)

    @staticmethod
    def _hook(tensor: Tensor, before: Callable[..., None], after: Callable[..., None]) -> None:
        wanted = tensor.requires_grad
        tensor.requires_grad_(True)  # a frozen tensor takes no hook, but may be unfrozen later
        tensor.register_hook(before)
        tensor.register_post_accumulate_grad_hook(after)
        tensor.requires_grad_(wanted)

    def is_of(self, whole: nn.Parameter, cuts: Sequence[Cut]) -> bool:
        """Whether the parts are still these views of the whole."""
        views = [cut(whole.detach()) for cut in cuts]
        return len(views) == len(self.parts) and all(map(_same_memory, views, self.parts))

    def _before_whole(self, grad: Tensor) -> None:
        self._agree(columns=False)

    def _before_part(self, grad: Tensor) -> None:
        self._agree(columns=self._across)

    @torch.no_grad()
    def _agree(self, columns: bool) -> None:
        """Before accumulation, makes the parts' gradients views of the whole's, or all None."""
        whole = self._whole()
        if whole is None:
            return
        if whole.grad is None:
            for part in self.parts:
                part.grad = None
            return
        for part, cut in zip(self.parts, self._cuts, strict=True):
            if part.grad is None:
                cut(whole.grad).zero_()
        if self._across and whole.grad.mT.is_contiguous() != columns:
            whole.grad = _blank(whole, columns).copy_(whole.grad)
        self._cut_grad(whole.grad)

    def _cut_grad(self, grad: Tensor) -> None:
        for part, cut in zip(self.parts, self._cuts, strict=True):
            region = cut(grad)
            if part.grad is None or not _same_memory(part.grad, region):
                part.grad = region

    @torch.no_grad()
    def _after_whole(self, whole: Tensor) -> None:
        # A gradient with a graph (create_graph) is not shared.
        if whole.grad is not None and not whole.grad.requires_grad:
            self._cut_grad(whole.grad)

    @torch.no_grad()
    def _after_part(self, part: Tensor, cut: Cut) -> None:
        whole = self._whole()
        if whole is None or part.grad is None or part.grad.requires_grad:
            return
        if whole.grad is None:
            whole.grad = _blank(whole, self._across).zero_()
        region = cut(whole.grad)
        if not _same_memory(part.grad, region):
            region.copy_(part.grad)
            part.grad = region


def _blank(like: Tensor, columns: bool) -> Tensor:
    """Memory for a gradient, column-major or row-major."""
    return like.new_empty(like.shape[::-1]).mT if columns else torch.empty_like(like)


def _same_memory(a: Tensor, b: Tensor) -> bool:
    return (a.data_ptr(), a.shape, a.stride()) == (b.data_ptr(), b.shape, b.stride())
