"""The book's model in OpenVINO: a graph whose caches are its state, built in memory."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fastgpt.bench.torch_gpt import TorchGPT

try:
    import numpy as np
except ImportError:  # then the peer is not installed either
    np = None  # type: ignore[assignment]


class OpenVino:
    """The model in float32, in bfloat16, or with weights in int8, a scale for each row; the
    products of these are in bfloat16 if the processor has it.

    Raises:
        RuntimeError: bfloat16 was asked for, and the processor does not have it.
    """

    def __init__(self, book: Any, cfg: dict[str, Any], precision: str) -> None:
        import openvino

        core = openvino.Core()
        has_bfloat16 = "BF16" in core.get_property("CPU", "OPTIMIZATION_CAPABILITIES")
        if precision == "bfloat16" and not has_bfloat16:
            raise RuntimeError("OpenVINO has no bfloat16 on this processor")
        exact = precision == "float32" or not has_bfloat16
        options = {
            "INFERENCE_NUM_THREADS": torch.get_num_threads(),
            "NUM_STREAMS": 1,
            "PERFORMANCE_HINT": "LATENCY",
            "INFERENCE_PRECISION_HINT": "f32" if exact else "bf16",
        }
        if precision == "float32":
            options["KV_CACHE_PRECISION"] = "f32"
        graph = _graph(TorchGPT(book, cfg), cfg, precision == "int8")
        self.request = core.compile_model(graph, "CPU", options).create_infer_request()

    def __call__(self, ids: Tensor) -> Tensor:
        """ids: [B, T]. Returns the logits, [B, T, V], valid until the next call."""
        self.request.reset_state()
        return self._run(ids, 0, first_row=0)

    def generate(self, ids: Tensor, max_new_tokens: int) -> Tensor:
        """ids: [B, T]. Returns [B, T + max_new_tokens], which must fit the context."""
        self.request.reset_state()
        unseen, past = ids, 0
        for _ in range(max_new_tokens):
            logits = self._run(unseen, past, first_row=-1)
            past += unseen.shape[1]
            unseen = logits.argmax(dim=-1)
            ids = torch.cat((ids, unseen), dim=1)
        return ids

    def _run(self, ids: Tensor, past: int, first_row: int) -> Tensor:
        positions, rows = np.arange(past, past + ids.shape[1]), np.arange(len(ids), dtype=np.int32)
        feed = (ids.numpy(), positions, rows, np.array([first_row]))
        self.request.start_async(feed, share_inputs=True)
        self.request.wait()
        return torch.from_numpy(self.request.get_output_tensor(0).data)


def _graph(model: TorchGPT, cfg: dict[str, Any], narrow: bool) -> Any:
    import openvino
    from openvino import opset13 as op

    heads, width = cfg["n_heads"], cfg["emb_dim"]

    def constant(value: Any) -> Any:
        return op.constant(value.detach().numpy() if isinstance(value, Tensor) else value)

    def norm(x: Any, of: nn.LayerNorm) -> Any:
        normal = op.mvn(x, constant([-1]), True, of.eps, "INSIDE_SQRT")
        return op.add(op.multiply(normal, constant(of.weight)), constant(of.bias))

    def linear(x: Any, of: nn.Linear) -> Any:
        weight = of.weight.detach()  # [N, K]
        if narrow:
            scale = weight.abs().amax(1, keepdim=True) / 127
            integers = constant((weight / scale).round().to(torch.int8))
            matrix = op.multiply(op.convert(integers, "f32"), constant(scale))
        else:
            matrix = constant(weight)
        y = op.matmul(x, matrix, False, True)
        return y if of.bias is None else op.add(y, constant(of.bias))

    def split(x: Any) -> Any:  # [B, T, D] to [B, H, T, D / H]
        shape = constant(np.array([0, 0, heads, width // heads]))
        return op.transpose(op.reshape(x, shape, True), constant([0, 2, 1, 3]))

    ids = op.parameter([-1, -1], np.int64, "ids")
    positions = op.parameter([-1], np.int64, "positions")
    rows = op.parameter([-1], np.int32, "rows")  # whose cache each row goes on with
    first_row = op.parameter([1], np.int64, "first_row")
    zero = constant(0)
    batch = op.gather(op.shape_of(ids), constant([0]), zero)
    start = op.broadcast(
        constant(np.float32(0)),
        op.concat([batch, constant(np.array([heads, 0, width // heads]))], 0),
    )
    sinks, shape = [], openvino.PartialShape([-1, heads, -1, width // heads])

    def cached(x: Any, name: str) -> Any:
        """The cache with x after it, which becomes the cache."""
        past = op.read_value(start, name, openvino.Type.f32, shape)
        now = op.concat([op.gather(past, rows, zero), x], 2)
        sinks.append(op.assign(now, name))
        return now

    tokens = op.gather(constant(model.tok_emb.weight), ids, zero)
    x = op.add(tokens, op.gather(constant(model.pos_emb.weight), positions, zero))
    for i, block in enumerate(model.blocks):
        qkv = linear(norm(x, block.norm1), block.qkv)
        q, k, v = map(split, op.split(qkv, constant(2), 3).outputs())
        k, v = cached(k, f"k.{i}"), cached(v, f"v.{i}")
        y = op.transpose(
            op.scaled_dot_product_attention(q, k, v, causal=True), constant([0, 2, 1, 3])
        )
        y = op.reshape(y, constant(np.array([0, 0, width])), True)
        x = op.add(x, linear(y, block.out_proj))
        h = op.gelu(linear(norm(x, block.norm2), block.widen), "tanh")
        x = op.add(x, linear(h, block.narrow))
    last, step = constant(np.array([2**31 - 1])), constant(np.array([1]))
    x = op.slice(norm(x, model.norm), first_row, last, step, constant(np.array([1])))
    inputs = [ids, positions, rows, first_row]
    return openvino.Model([op.result(linear(x, model.out_head))], sinks, inputs, "gpt2")
