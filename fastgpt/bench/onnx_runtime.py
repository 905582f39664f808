"""The book's model in ONNX Runtime: a graph of its fused operators, built in memory."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fastgpt.bench.torch_gpt import TorchGPT

try:
    import numpy as np
except ImportError:  # then the peer is not installed either
    np = None  # type: ignore[assignment]

FUSED = "com.microsoft"  # the domain of the fused operators
STANDARD = ("Add", "Gather", "MatMul", "Slice")
GROUP = 32  # weights that share a scale in int4


class OnnxRuntime:
    """The model in float32; with weights and activations in int8 ("int8-dynamic": a scale for each
    row of a weight and one for all activations of a product); or with weights in int4, a scale for
    each group.
    """

    def __init__(self, book: Any, cfg: dict[str, Any], precision: str) -> None:
        import onnxruntime

        model = TorchGPT(book, cfg)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        # Its threads would go on spinning while the next peer runs.
        options.add_session_config_entry("session.force_spinning_stop", "1")
        self.session = onnxruntime.InferenceSession(
            _Graph(precision).of(model, cfg), options, ["CPUExecutionProvider"]
        )
        self.value = onnxruntime.OrtValue.ortvalue_from_numpy
        self.heads = cfg["n_heads"], cfg["emb_dim"] // cfg["n_heads"]
        self.caches = [f"{kind}.{i}" for i in range(cfg["n_layers"]) for kind in "kv"]

    def __call__(self, ids: Tensor) -> Tensor:
        """ids: [B, T]. Returns the logits, [B, T, V]."""
        none = np.zeros((len(ids), self.heads[0], 0, self.heads[1]), np.float32)
        feed = self._feed(ids, 0, first_row=0) | {f"past.{name}": none for name in self.caches}
        return torch.from_numpy(self.session.run(["logits"], feed)[0])

    def generate(self, ids: Tensor, max_new_tokens: int) -> Tensor:
        """ids: [B, T]. Returns [B, T + max_new_tokens], which must fit the context."""
        shape = (len(ids), self.heads[0], ids.shape[1] + max_new_tokens, self.heads[1])
        caches = {name: self.value(np.zeros(shape, np.float32)) for name in self.caches}
        unseen, past = ids, 0
        for _ in range(max_new_tokens):
            binding = self.session.io_binding()
            for name, array in self._feed(unseen, past, first_row=-1).items():
                binding.bind_cpu_input(name, array)
            for name, cache in caches.items():  # written in place
                binding.bind_ortvalue_input(f"past.{name}", cache)
                binding.bind_ortvalue_output(f"now.{name}", cache)
            binding.bind_output("logits", "cpu")
            self.session.run_with_iobinding(binding)
            past += unseen.shape[1]
            unseen = torch.from_numpy(binding.get_outputs()[-1].numpy()).argmax(dim=-1)
            ids = torch.cat((ids, unseen), dim=1)
        return ids

    def _feed(self, ids: Tensor, past: int, first_row: int) -> dict[str, Any]:
        total = past + ids.shape[1]
        return {
            "ids": ids.numpy(),
            "positions": np.arange(past, total),
            "last_keys": np.full(len(ids), total - 1, np.int32),
            "total": np.array(total, np.int32),
            "first_row": np.array([first_row]),
        }


class _Graph:
    """Collects nodes and constants. A method that adds nodes returns the name of their result."""

    def __init__(self, precision: str) -> None:
        self.precision = precision
        self.nodes: list[Any] = []
        self.constants: list[Any] = []

    def of(self, model: TorchGPT, cfg: dict[str, Any]) -> bytes:
        """The model as an ONNX file."""
        from onnx import TensorProto as Kind
        from onnx import helper

        ints = {"ids": ["B", "T"], "positions": ["T"], "first_row": [1]}
        inputs = [helper.make_tensor_value_info(n, Kind.INT64, s) for n, s in ints.items()]
        ints = {"last_keys": ["B"], "total": []}
        inputs += [helper.make_tensor_value_info(n, Kind.INT32, s) for n, s in ints.items()]
        outputs = [helper.make_tensor_value_info("logits", Kind.FLOAT, ["B", "R", "V"])]
        heads = cfg["n_heads"]
        tokens = self.node("Gather", self.constant(model.tok_emb.weight), "ids")
        places = self.node("Gather", self.constant(model.pos_emb.weight), "positions")
        norms = [*(block.norm1 for block in model.blocks), model.norm]
        h, x = self.add_and_norm(tokens, places, norms[0], None)
        for i, block in enumerate(model.blocks):
            for name in (f"k.{i}", f"v.{i}"):
                for put, when in ((inputs, "past"), (outputs, "now")):
                    shape = ["B", heads, f"{when} tokens", cfg["emb_dim"] // heads]
                    put.append(helper.make_tensor_value_info(f"{when}.{name}", Kind.FLOAT, shape))
            qkv = self.product(h, block.qkv)
            if block.qkv.bias is not None:
                qkv = self.node("Add", qkv, self.constant(block.qkv.bias))
            of = (qkv, "", "", f"past.k.{i}", f"past.v.{i}", "last_keys", "total")
            h = self.node(
                "GroupQueryAttention",
                *of,
                more=(f"now.k.{i}", f"now.v.{i}"),
                num_heads=heads,
                kv_num_heads=heads,
            )
            h = self.product(h, block.out_proj)
            h, x = self.add_and_norm(h, x, block.norm2, block.out_proj.bias)
            h = self.product(h, block.widen)
            h = self.node("FastGelu", h, self.constant(block.widen.bias))
            h = self.product(h, block.narrow)
            h, x = self.add_and_norm(h, x, norms[i + 1], block.narrow.bias)
        end, axis = (self.constant(np.array([value])) for value in (2**31 - 1, 1))
        self.product(self.node("Slice", h, "first_row", end, axis), model.out_head, "logits")
        graph = helper.make_graph(self.nodes, "gpt2", inputs, outputs, self.constants)
        opsets = [helper.make_opsetid("", 18), helper.make_opsetid(FUSED, 1)]
        file: bytes = helper.make_model(
            graph, opset_imports=opsets, ir_version=9
        ).SerializeToString()
        return file

    def constant(self, value: Any) -> str:
        from onnx import numpy_helper

        name = f"constant.{len(self.constants)}"
        array = value.detach().numpy() if isinstance(value, Tensor) else value
        self.constants.append(numpy_helper.from_array(np.ascontiguousarray(array), name))
        return name

    def node(
        self, kind: str, *inputs: str, more: tuple[str, ...] = (), out: str = "", **attributes: Any
    ) -> str:
        from onnx import helper

        out = out or f"{kind}.{len(self.nodes)}"
        domain = "" if kind in STANDARD else FUSED
        made = helper.make_node(kind, inputs, (out, *more), domain=domain, **attributes)
        self.nodes.append(made)
        return out

    def add_and_norm(
        self, x: str, y: str, norm: nn.LayerNorm, bias: Tensor | None
    ) -> tuple[str, str]:
        """The norm of x + y + bias, and that sum."""
        parts = (norm.weight, norm.bias) if bias is None else (norm.weight, norm.bias, bias)
        total = f"sum.{len(self.nodes)}"
        names = map(self.constant, parts)
        more = ("", "", total)
        kind = "SkipLayerNormalization"
        return self.node(kind, x, y, *names, more=more, epsilon=norm.eps), total

    def product(self, x: str, linear: nn.Linear, out: str = "") -> str:
        """x @ weight.T, without the bias."""
        weight = linear.weight.detach()  # [N, K]
        N, K = weight.shape
        if self.precision == "float32":
            return self.node("MatMul", x, self.constant(weight.T), out=out)
        if self.precision == "int8-dynamic":
            scale = weight.abs().amax(1) / 127
            narrow = (weight / scale[:, None]).round().to(torch.int8)
            names = map(self.constant, (narrow.T, scale))
            return self.node("DynamicQuantizeMatMul", x, *names, out=out)
        groups = weight.view(N, -1, GROUP)
        scale = groups.gather(2, groups.abs().argmax(2, keepdim=True)) / -8  # the largest is exact
        narrow = (groups / scale).round().clamp(-8, 7).add(8).to(torch.uint8)
        pairs = narrow[..., 0::2] | narrow[..., 1::2] << 4
        names = map(self.constant, (pairs, scale.flatten()))
        # Level 4 takes the activations to int8, the fastest of its ways.
        sizes: dict[str, Any] = {"K": K, "N": N, "bits": 4, "block_size": GROUP}
        return self.node("MatMulNBits", x, *names, out=out, accuracy_level=4, **sizes)
