"""The names of a GPT-2's tensors, and which parameters of the book's model each tensor fills.

There are four styles: the book's (also with the packed projections and torch's norms of its faster
variant), Hugging Face's, OpenAI's variables, and the nested dictionary that the book makes of
those. Nested names are joined with a slash, as in OpenAI's.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

Shape = tuple[int, ...]

_PROJECTIONS = ("att.W_query", "att.W_key", "att.W_value")
_LEAVES = ("weight", "bias")
_WRAPPERS = ("_orig_mod", "module")  # of torch.compile and of data parallelism
# Where a GPT-2's own names begin; before that are the attributes that lead to the model.
_PARTS = re.compile(
    r"(?:^|\.)((?:tok_emb|pos_emb|trf_blocks|final_norm|out_head|transformer|lm_head"
    r"|wte|wpe|h\.\d+|ln_f)\..*)"
)


class WeightsError(ValueError):
    """Weights can't be read or don't fit the model; every tensor at fault is named."""


@dataclass(frozen=True)
class Entry:
    """One tensor of a checkpoint.

    Args:
        shape: its shape.
        targets: keys of the book's state dict that it fills, each with an equal part of its
            outputs; none if it must be zero.
        transposed: whether it is [in, out], while the parameter is [out, in].
        optional: whether it may be missing.
    """

    shape: Shape
    targets: tuple[str, ...]
    transposed: bool = False
    optional: bool = False

    @property
    def part(self) -> Shape:
        """The shape of each target."""
        shape = self.shape[::-1] if self.transposed else self.shape
        return (shape[0] // max(1, len(self.targets)), *shape[1:])


@dataclass(frozen=True)
class Style:
    """A style of names. Modules are keyed by their names in the book's block."""

    block: str  # prefix of the modules of layer {}
    tok: str
    pos: str
    final: str  # prefix of the last norm's tensors
    head: str | None
    modules: Mapping[tuple[str, ...], str]
    norm: tuple[str, str]
    linear: tuple[str, str]
    separator: str = "."
    transposed: bool = False
    mask: str | None = None
    ignored: tuple[str, ...] = ()  # buffers of a block that have no information

    def layers(self, names: Iterable[str]) -> int:
        """The number of layers that these names belong to."""
        pattern = re.compile(re.escape(self.block).replace(r"\{\}", r"(\d+)"))
        found = (pattern.match(name) for name in names)
        return max((int(match[1]) + 1 for match in found if match), default=0)

    def qkv_bias(self, names: Iterable[str]) -> bool:
        """Whether one of these names is the bias of a query, key or value projection."""
        projections = [name for keys, name in self.modules.items() if keys[0] in _PROJECTIONS]
        ends = tuple(f"{name}{self.separator}{self.linear[1]}" for name in projections)
        return any(name.endswith(ends) for name in names)

    def is_ignored(self, name: str, layers: int) -> bool:
        """Whether this name is that of a buffer without information."""
        ends = [self.block.format(layer) + end for layer in range(layers) for end in self.ignored]
        return name in ends


def unwrapped(name: str) -> str:
    """The name without the parts that torch.compile, data parallelism or an enclosing module (such
    as Lightning's) have added.
    """
    name = ".".join(part for part in name.split(".") if part not in _WRAPPERS)
    found = _PARTS.search(name)
    return found[1] if found else name


def style_of(names: Iterable[str]) -> Style | None:
    """The style of these names, or None if they are not a GPT-2's."""
    names = list(names)
    if any(re.match(r"trf_blocks\.|tok_emb\.|pos_emb\.|final_norm\.|out_head\.", n) for n in names):
        return _book(names)
    for root in ("transformer.", ""):
        if any(re.match(re.escape(root) + r"(h\.\d+\.|wte\.|wpe\.|ln_f\.)", n) for n in names):
            return _hugging_face(root)
    for root in ("model/", ""):
        if any(re.match(root + r"(h\d+/|blocks/\d+/|wte$|wpe$|ln_f/)", n) for n in names):
            return _openai(root, nested=any(n.startswith(root + "blocks/") for n in names))
    return None


def hugging_face() -> Style:
    """The names of Hugging Face's GPT2LMHeadModel."""
    return _hugging_face("transformer.")


def _book(names: Iterable[str]) -> Style:
    ends = {match[1] for name in names if (match := re.match(r"trf_blocks\.\d+\.(.+)", name))}
    packed = any(end.startswith("att.qkv.") for end in ends)
    proj = "att.proj" if any(end.startswith("att.proj.") for end in ends) else "att.out_proj"
    modules: dict[tuple[str, ...], str] = {("att.out_proj",): proj}
    modules |= {_PROJECTIONS: "att.qkv"} if packed else {(key,): key for key in _PROJECTIONS}
    modules |= {(key,): key for key in ("norm1", "norm2", "ff.layers.0", "ff.layers.2")}
    torchs = "norm1.weight" in ends or "final_norm.weight" in names
    return Style(
        block="trf_blocks.{}.",
        tok="tok_emb.weight",
        pos="pos_emb.weight",
        final="final_norm.",
        head="out_head.weight",
        modules=modules,
        norm=("weight", "bias") if torchs else ("scale", "shift"),
        linear=("weight", "bias"),
        mask="trf_blocks.{}.att.mask",
    )


def _hugging_face(root: str) -> Style:
    return Style(
        block=root + "h.{}.",
        tok=root + "wte.weight",
        pos=root + "wpe.weight",
        final=root + "ln_f.",
        head="lm_head.weight",
        modules={
            _PROJECTIONS: "attn.c_attn",
            ("att.out_proj",): "attn.c_proj",
            ("norm1",): "ln_1",
            ("norm2",): "ln_2",
            ("ff.layers.0",): "mlp.c_fc",
            ("ff.layers.2",): "mlp.c_proj",
        },
        norm=("weight", "bias"),
        linear=("weight", "bias"),
        transposed=True,
        ignored=("attn.bias", "attn.masked_bias"),
    )


def _openai(root: str, nested: bool) -> Style:
    theirs = _hugging_face(root)
    return Style(
        block=root + ("blocks/{}/" if nested else "h{}/"),
        tok=root + "wte",
        pos=root + "wpe",
        final=root if nested else root + "ln_f/",
        head=None,
        modules={keys: name.replace(".", "/") for keys, name in theirs.modules.items()},
        norm=("g", "b"),
        linear=("w", "b"),
        separator="/",
        transposed=True,
    )


def expected(style: Style, cfg: Mapping[str, Any], head_optional: bool = False) -> dict[str, Entry]:
    """Every tensor of a GPT-2 of this config, by its name in this style.

    With qkv_bias False, a packed bias of the projections, which Hugging Face's model always has,
    is allowed if it is zero.
    """
    width, separator = cfg["emb_dim"], style.separator
    entries = {
        style.tok: Entry((cfg["vocab_size"], width), ("tok_emb.weight",)),
        style.pos: Entry((cfg["context_length"], width), ("pos_emb.weight",)),
        style.final + style.norm[0]: Entry((width,), ("final_norm.scale",)),
        style.final + style.norm[1]: Entry((width,), ("final_norm.shift",)),
    }
    if style.head:
        shape = (cfg["vocab_size"], width)
        entries[style.head] = Entry(shape, ("out_head.weight",), optional=head_optional)
    for layer in range(cfg["n_layers"]):
        key = f"trf_blocks.{layer}."
        for keys, name in style.modules.items():
            path = style.block.format(layer) + name + separator
            if keys[0].startswith("norm"):
                for leaf, ours in zip(style.norm, ("scale", "shift"), strict=True):
                    entries[path + leaf] = Entry((width,), (f"{key}{keys[0]}.{ours}",))
                continue
            n_in, n_out = (4 * width if keys[0] == f"ff.layers.{i}" else width for i in (2, 0))
            n_out *= len(keys)
            weights, biases = (tuple(f"{key}{k}.{leaf}" for k in keys) for leaf in _LEAVES)
            shape = (n_in, n_out) if style.transposed else (n_out, n_in)
            entries[path + style.linear[0]] = Entry(shape, weights, style.transposed)
            if cfg["qkv_bias"] or keys[0] not in _PROJECTIONS:
                entries[path + style.linear[1]] = Entry((n_out,), biases)
            elif len(keys) > 1:
                entries[path + style.linear[1]] = Entry((n_out,), (), optional=True)
    return entries
