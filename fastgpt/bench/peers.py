"""The peers: what runs the work, at which precisions, and how it is named and drawn."""

from __future__ import annotations

from collections.abc import Collection
from importlib.util import find_spec
from typing import NamedTuple

PRECISIONS = ("float32", "bfloat16", "int8", "int8-dynamic", "int4")


class Engine(NamedTuple):
    """What runs the work, in one precision or several."""

    label: str
    colour: str
    precisions: tuple[str, ...] = PRECISIONS[:1]
    packages: tuple[str, ...] = ()  # that it needs beside torch


ENGINES = {
    "reference": Engine("the book", "#495057"),
    "cached": Engine("the book, with a cache", "#8d99a6"),
    "plain": Engine("fastgpt, token by token", "#0b2545"),
    "torch": Engine("PyTorch, fused by hand", "#e8590c"),
    "compile": Engine("torch.compile", "#f4a261"),
    "onednn": Engine("PyTorch, oneDNN's products", "#c2255c", ("float32", "bfloat16")),
    "hf": Engine("Hugging Face", "#e9c030", packages=("transformers",)),
    "ct2": Engine("CTranslate2", "#74a816", packages=("transformers", "ctranslate2")),
    "onnx": Engine(
        "ONNX Runtime", "#2b8a3e", ("float32", "int8-dynamic", "int4"), ("onnx", "onnxruntime")
    ),
    "llama": Engine(
        "llama.cpp", "#862e9c", ("float32", "bfloat16", "int8", "int4"), ("gguf", "llama_cpp")
    ),
    "openvino": Engine("OpenVINO", "#0c8599", ("float32", "bfloat16", "int8"), ("openvino",)),
    "products": Engine("products by PyTorch's library", "#a78bbf"),
    "fastgpt": Engine("fastgpt", "#1556a0", PRECISIONS),
    "loss": Engine("fastgpt, model.loss", "#4fa3e8"),
    "alike": Engine("fastgpt, batch_invariant", "#1c7ed6", PRECISIONS),
}


class Peer(NamedTuple):
    """An engine at a precision."""

    engine: str
    precision: str

    @property
    def label(self) -> str:
        """Its name for people, with the precision where the engine has several."""
        engine = ENGINES[self.engine]
        several = len(engine.precisions) > 1
        return f"{engine.label}, {self.precision}" if several else engine.label

    @property
    def is_ours(self) -> bool:
        return self.engine in ("fastgpt", "loss", "plain", "alike")

    @property
    def is_float32(self) -> bool:
        return self.precision == "float32"

    def missing(self) -> str | None:
        """What is not installed that the peer needs; None if nothing is."""
        absent = [name for name in ENGINES[self.engine].packages if find_spec(name) is None]
        return f"{', '.join(absent)} not installed" if absent else None


# By name: the engine's own in float32, else with the precision behind it.
PEERS = {
    engine if precision == "float32" else f"{engine} {precision}": Peer(engine, precision)
    for precision in PRECISIONS
    for engine, known in ENGINES.items()
    if precision in known.precisions
}


def chosen(engines: Collection[str], precisions: Collection[str]) -> list[str]:
    """The names of the peers of these engines at these precisions."""
    return [n for n, p in PEERS.items() if p.engine in engines and p.precision in precisions]
