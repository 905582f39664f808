"""A whole transformer block of a training step: attention and feed-forward with their norms,
dropouts and shortcuts as one operation, which keeps little more than its products need.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from fastgpt import dispatch
from fastgpt.cpu.transformer_block import (
    EPS,
    BlockParameters,
    Dropouts,
    record,
    transformer_block_backward,
)
from fastgpt.cpu.transformer_block import transformer_block as cpu_forward
from fastgpt.ops.causal_attention import weights as attention_weights
from fastgpt.ops.dropout_seed import draw_seeds, refuse_double_backward


def transformer_block(
    x: Tensor,
    parameters: BlockParameters,
    n_heads: int,
    attention_p: float = 0.0,
    shortcut_p: float = 0.0,
    owner: object | None = None,
) -> Tensor | None:
    """m + dropout(ff(norm2(m))) with m = x + dropout(attention(norm1(x))).

    Args:
        x: [B, T, D] float32 on the CPU.
        parameters: with D a multiple of n_heads.
        n_heads: number of heads.
        attention_p: probability of dropping an attention weight.
        shortcut_p: probability of dropping an element in front of each shortcut.
        owner: what the scratch memory is kept with between calls, say the model.

    Returns:
        [B, T, D]; None where no kernel takes these tensors and the operations inside must run one
        by one. Draws one number from torch's CPU generator for each dropout that drops something.

    Raises:
        ValueError: D is not a multiple of n_heads, or a probability is not one.
    """
    if n_heads <= 0 or x.shape[-1] % n_heads:
        raise ValueError(f"the width {x.shape[-1]} must be a multiple of n_heads {n_heads}")
    if x.dim() != 3 or x.numel() == 0 or not dispatch.runs_whole(x) or x.dtype != torch.float32:
        return None
    fields = record(parameters, x.shape[2])
    if fields is None:
        return None
    seeds = draw_seeds(attention_p, shortcut_p, shortcut_p)
    drops = Dropouts(attention_p, shortcut_p, seeds)
    return _TransformerBlock.apply(x, n_heads, drops, owner, fields, *parameters)


class _TransformerBlock(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, n_heads, drops, owner, fields, *parameters):
        inside, p = x.contiguous(), BlockParameters(*parameters)
        y = torch.empty_like(inside)
        kept = cpu_forward(inside, p, n_heads, y, drops, owner, fields)
        ctx.save_for_backward(x, *parameters, kept)
        ctx.n_heads, ctx.drops, ctx.owner = n_heads, drops, owner
        return y

    @staticmethod
    def backward(ctx, dy):
        x, *parameters, kept = ctx.saved_tensors
        p = BlockParameters(*parameters)
        wanted = (ctx.needs_input_grad[0], *ctx.needs_input_grad[5:])
        if dispatch.once(None, dy):
            grads = transformer_block_backward(
                dy.contiguous(), x.contiguous(), p, ctx.n_heads, kept, ctx.drops, wanted, ctx.owner
            )
        else:
            refuse_double_backward(max(ctx.drops.attention_p, ctx.drops.shortcut_p))
            grads = _differentiable_gradients(dy, x, p, ctx.n_heads, wanted)
        return grads[0], None, None, None, None, *grads[1:]


def _differentiable_gradients(dy, x, p, n_heads, wanted):
    """By taking the block apart again in PyTorch's operations."""
    inputs = [t for t, want in zip((x, *p), wanted, strict=True) if want]
    with torch.enable_grad():
        y = _torch(x, p, n_heads)
        found = iter(torch.autograd.grad(y, inputs, dy, create_graph=True))
    return [next(found) if want else None for want in wanted]


def _torch(x: Tensor, p: BlockParameters, n_heads: int) -> Tensor:
    width = x.shape[-1:]
    h = F.layer_norm(x, width, p.scale1, p.shift1, EPS)
    q, k, v = (
        F.linear(h, weight, bias).unflatten(-1, (n_heads, -1)).transpose(1, 2)
        for weight, bias in zip(p[2:8:2], p[3:8:2], strict=True)
    )
    context = attention_weights(q, k, q.shape[3] ** -0.5) @ v
    x = x + F.linear(context.transpose(1, 2).flatten(2), p.out_weight, p.out_bias)
    h = F.layer_norm(x, width, p.scale2, p.shift2, EPS)
    h = F.gelu(F.linear(h, p.up_weight, p.up_bias), approximate="tanh")
    return x + F.linear(h, p.down_weight, p.down_bias)
