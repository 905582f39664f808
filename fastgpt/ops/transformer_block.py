"""A whole transformer block of a training step: attention and feed-forward with their norms,
dropouts and shortcuts as one operation, which keeps little more than its products need.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from fastgpt import batch_invariance, dispatch
from fastgpt.cpu.records import FORMATS, Block, block_fields
from fastgpt.cpu.transformer_block import Dropouts, transformer_block_backward
from fastgpt.cpu.transformer_block import transformer_block as cpu_forward
from fastgpt.ops.causal_attention import weights as attention_weights
from fastgpt.ops.dropout_seed import draw_seeds, refuse_double_backward
from fastgpt.torch_state import version


def transformer_block(
    x: Tensor,
    parameters: Block,
    n_heads: int,
    attention_p: float = 0.0,
    shortcut_p: float = 0.0,
    eps: float = 1e-5,
    owner: object | None = None,
) -> Tensor | None:
    """m + dropout(ff(norm2(m))) with m = x + dropout(attention(norm1(x))).

    Args:
        x: [B, T, D] on the CPU, in the parameters' dtype: float32, bfloat16 or float16. Under
            autocast to bfloat16 products take bfloat16 factors.
        parameters: with D a multiple of n_heads.
        n_heads: number of heads.
        attention_p: probability of dropping an attention weight.
        shortcut_p: probability of dropping an element in front of each shortcut.
        eps: added to the variance in both norms.
        owner: what the scratch memory is kept with between calls, such as the model.

    Returns:
        [B, T, D]; None if no kernel takes these tensors and the operations inside must run one
        by one. Draws one number from torch's generator for the device for each dropout that drops
        something.

    Raises:
        ValueError: D is not a multiple of n_heads, or a probability is not one.
    """
    if n_heads <= 0 or x.shape[-1] % n_heads:
        raise ValueError(f"the width {x.shape[-1]} must be a multiple of n_heads {n_heads}")
    if x.dim() != 3 or x.numel() == 0 or not dispatch.runs_whole(x) or x.dtype not in FORMATS:
        return None
    if batch_invariance.asked():  # one by one each operation tells whether it can
        return None
    autocasts = dispatch.autocasts(x)
    if autocasts and x.dtype is torch.float16:  # which would not stay float16
        return None
    if any(isinstance(p, tuple) for p in parameters.flat()):  # quantised
        return None
    fields = block_fields(parameters, x.dtype, x.shape[2])
    if fields is None:
        return None
    seeds = draw_seeds(x.device, attention_p, shortcut_p, shortcut_p)
    drops = Dropouts(attention_p, shortcut_p, seeds)
    how = (n_heads, drops, eps, autocasts or x.dtype is torch.bfloat16, owner)
    return _TransformerBlock.apply(x, how, fields, *parameters.flat())


_BIASES = (3, 5, 7, 9, 13, 15)  # of the linear layers, in a flat Block


class _TransformerBlock(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, how, fields, *flat):
        n_heads, drops, eps, narrow, owner = how
        inside = x.contiguous()
        y = torch.empty_like(inside)
        kept = cpu_forward(inside, Block.of(flat), n_heads, y, drops, eps, narrow, owner, fields)
        # The first derivative does not need the values of these, which may change before it.
        ctx.biases = [(flat[i], None if flat[i] is None else version(flat[i])) for i in _BIASES]
        ctx.save_for_backward(x, *(None if i in _BIASES else p for i, p in enumerate(flat)), kept)
        ctx.how = how
        return y

    @staticmethod
    def backward(ctx, dy):
        x, *flat, kept = ctx.saved_tensors
        for i, (bias, _) in zip(_BIASES, ctx.biases, strict=True):
            flat[i] = bias
        n_heads, drops, eps, narrow, owner = ctx.how
        p, want_x, rest = Block.of(flat), ctx.needs_input_grad[0], ctx.needs_input_grad[3:]
        if dispatch.first_order(None, dy):
            tensors = (dy.contiguous(), x.contiguous(), p, n_heads, kept, drops)
            dx, grads = transformer_block_backward(*tensors, want_x, Block.of(rest), narrow, owner)
            found = (dx, *grads.flat())
        else:
            refuse_double_backward(max(drops.attention_p, drops.shortcut_p))
            if any(bias is not None and version(bias) != then for bias, then in ctx.biases):
                raise RuntimeError(
                    "a second derivative needs the biases of the forward pass, and one of them has "
                    "been modified by an inplace operation"
                )
            found = _differentiable_gradients(dy, x, p, n_heads, eps, (want_x, *rest))
        return found[0], None, None, *found[1:]


def _differentiable_gradients(dy, x, p, n_heads, eps, wanted):
    """By taking the block apart again in PyTorch's operations. Views of the tensors, so that one
    which stands in two places, or which x came from, has each place's own gradient.
    """
    with torch.enable_grad():
        x, *flat = (None if t is None else t.view_as(t) for t in (x, *p.flat()))
        y = _torch(x, Block.of(flat), n_heads, eps)
        inputs = [t for t, want in zip((x, *flat), wanted, strict=True) if want]
        found = iter(torch.autograd.grad(y, inputs, dy, create_graph=True))
    return [next(found) if want else None for want in wanted]


def _torch(x: Tensor, p: Block, n_heads: int, eps: float) -> Tensor:
    width = x.shape[-1:]
    h = F.layer_norm(x, width, *p.norm1, eps)
    q, k, v = (
        F.linear(h, *layer).unflatten(-1, (n_heads, -1)).transpose(1, 2)
        for layer in (p.query, p.key, p.value)
    )
    context = attention_weights(q, k, q.shape[3] ** -0.5) @ v
    x = x + F.linear(context.transpose(1, 2).flatten(2), *p.out)
    h = F.layer_norm(x, width, *p.norm2, eps)
    return x + F.linear(F.gelu(F.linear(h, *p.up), approximate="tanh"), *p.down)
