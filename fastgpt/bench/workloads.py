"""The work that is measured on the whole model: forward passes, training steps, generation, and
the scores of texts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property, lru_cache, partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastgpt import (
    GPT_CONFIG_124M,
    GPTModel,
    generate,
    generate_batch,
    generate_text_simple,
    reference,
    score,
)
from fastgpt.bench import different_lengths, foretold, libraries
from fastgpt.bench.bound import bound_seconds, forward_flops, generation_flops, weight_bytes
from fastgpt.bench.cached_book import CachedBook
from fastgpt.bench.case import Case
from fastgpt.bench.errors import Result
from fastgpt.bench.llama import LlamaCpp
from fastgpt.bench.narrow import Narrow
from fastgpt.bench.onednn import onednn
from fastgpt.bench.onnx_runtime import OnnxRuntime
from fastgpt.bench.openvino import OpenVino
from fastgpt.bench.peers import PEERS, Peer
from fastgpt.bench.torch_gpt import TorchGPT
from fastgpt.bench.verdicts import Forward, Generation, Scores, Training

TOY = {"vocab_size": 256, "context_length": 64, "emb_dim": 64, "n_heads": 2, "n_layers": 2}
CONFIGS: dict[str, dict[str, Any]] = {
    "GPT-2 124M": GPT_CONFIG_124M,
    "GPT-2 124M, no dropout": GPT_CONFIG_124M | {"drop_rate": 0.0},
    # Random weights never repeat themselves. In a loop of so many tokens each foretells the next.
    "GPT-2 124M in loops": GPT_CONFIG_124M | {"loop": 20},
    # It writes what stands in this module of Python.
    "GPT-2 124M of source": GPT_CONFIG_124M | {"source": "argparse"},
    # Of few tokens most have stood in the text before: they are guessed, and the guess is wrong.
    "GPT-2 of bytes": GPT_CONFIG_124M | {"vocab_size": 256},
    "toy": GPT_CONFIG_124M | TOY,
    "toy in loops": GPT_CONFIG_124M | TOY | {"loop": 20},
}
SEED = 123
EXACT_TOKENS = 512  # a training step on more tokens is not repeated in float64
EXACT_TEXTS = 8  # whose scores are
BATCH = 32  # the most sequences that fastgpt generates at once
SOURCE = 512  # tokens that are foretold of a source
GUESSES = 10  # tokens that Hugging Face guesses a pass, as its documentation does

EXPORTED: dict[str, Callable[..., Any]] = {  # made of the book's model, its config, a precision
    "onednn": onednn,
    "onnx": OnnxRuntime,
    "llama": LlamaCpp,
    "openvino": OpenVino,
}

Peers = dict[str, Callable[[], Result | None]]


@dataclass(frozen=True)
class Work:
    """One piece of work on token ids [batch, tokens], or on `batch` sequences of different lengths.

    The kinds are forward, train (forward and backward), decode (greedy), lookup (one sequence,
    tokens guessed and checked), and of different lengths batch (greedy) and score.
    """

    kind: str
    config: str  # of CONFIGS
    batch: int
    tokens: int  # of the longest sequence
    new: int = 0  # tokens to decode, at most
    shortest: int = 0  # batch, score: the tokens of the shortest sequence ..
    fewest: int = 0  # .. and the fewest to decode
    uncached: bool = False  # decode: the reference is the book's own loop, without a cache
    drawn: bool = False  # lookup: tokens are drawn, at temperature 1
    weigh: bool = False  # whether to measure the peers' peak memory
    rounds: int | None = None  # at most, where one takes minutes

    @property
    def name(self) -> str:
        loop = ", the book's loop" if self.uncached else ""
        return f"{self.kind} {self.config} {self.size}{loop}"

    @property
    def size(self) -> str:
        """The batch, its tokens and the new ones."""
        tokens, new = (
            f"{least}-{most}" if least else f"{most}"
            for least, most in ((self.shortest, self.tokens), (self.fewest, self.new))
        )
        more = f" + {new}" if self.new else ""
        return f"[{self.batch}, {tokens}]{more}" + (", drawn" if self.drawn else "")

    @property
    def tokens_done(self) -> int:
        if self.kind == "score":  # the first of a text has no score
            return sum(len(text) - 1 for text in self.texts)
        return sum(self.counts) if self.new else self.batch * self.tokens

    @property
    def cfg(self) -> dict[str, Any]:
        return CONFIGS[self.config]

    @property
    def bound(self) -> float | None:
        """The seconds that no code for this machine can beat; None if the peaks are not measured,
        or if a pass may bring any number of tokens.

        Every pass reads each weight once, and each new token of a sequence takes a pass.
        """
        cfg, weights = self.cfg, weight_bytes(self.cfg)
        if self.kind == "lookup":
            return None
        if self.kind == "score":
            flops = sum(forward_flops(cfg, len(text) - 1) for text in self.texts)
            return bound_seconds(flops, weights)
        if self.kind in ("forward", "train"):
            times = 3 if self.kind == "train" else 1
            return bound_seconds(times * self.batch * forward_flops(cfg, self.tokens), weights)
        each = [
            generation_flops(cfg, len(text), count)
            for text, count in zip(self.texts, self.counts, strict=True)
        ]
        if self.kind == "batch":  # a pass may serve any tokens of any sequences
            return bound_seconds(sum(map(sum, each)), max(self.counts) * weights)
        passes = [bound_seconds(sum(flops), weights) for flops in zip(*each, strict=True)]
        return sum(seconds for seconds in passes if seconds is not None) or None

    @property
    def ids(self) -> Tensor:
        """The token ids, [batch, tokens]. A model whose text is foretold would have gone on the
        same way.
        """
        if loop := self.cfg.get("loop"):
            return (loop + torch.arange(self.tokens) % loop).expand(self.batch, -1)
        if module := self.cfg.get("source"):
            return foretold.source(module, SOURCE)[None, : self.tokens]
        torch.manual_seed(SEED)
        return torch.randint(1, self.cfg["vocab_size"], (self.batch, self.tokens))  # 0 is HF's pad

    @property
    def texts(self) -> tuple[Tensor, ...]:
        """The token ids of each sequence, [tokens]."""
        if not self.shortest:
            return self.ids.unbind()
        drawn = torch.Generator().manual_seed(SEED)
        lengths = torch.randint(self.shortest, self.tokens + 1, (self.batch,), generator=drawn)
        vocabulary = self.cfg["vocab_size"]
        return tuple(torch.randint(1, vocabulary, (int(n),), generator=drawn) for n in lengths)

    @property
    def counts(self) -> list[int]:
        """How many tokens each sequence gets, whatever its length."""
        drawn = torch.Generator().manual_seed(SEED + 1)
        few = self.fewest or self.new
        return torch.randint(few, self.new + 1, (self.batch,), generator=drawn).tolist()

    def peers(self, models: Models) -> Peers:
        """How each peer does the work. What a peer needs is made when it first runs."""
        kinds = {
            "forward": _forward,
            "train": _train,
            "decode": _decode,
            "lookup": _drawn if self.drawn else _lookup,
            "batch": _batch,
            "score": _score,
        }
        return kinds[self.kind](self, models)

    @property
    def peer_names(self) -> list[str]:
        """The peers that do this work."""
        return list(self.peers(Models(self.cfg)))

    def case(self) -> Case:
        """The work with its exact result. Models are kept until a case of another config."""
        models = _models(self.config)
        models.train(False)
        peers = self.peers(models)
        skipped = {peer: why for peer in peers if (why := PEERS[peer].missing())}
        if self.drawn:
            return Case(peers, peers["plain"](), skipped, "plain")
        if self.kind in ("decode", "lookup", "batch"):
            base = "reference" if self.kind == "decode" else "plain"
            return Generation(
                peers, None, skipped, base, self.rounds, models=models, prompts=self.texts
            )
        if self.kind == "score":
            with models.in_float64(), torch.no_grad():  # one by one: their logits are large
                texts = self.texts[:EXACT_TEXTS]
                right = [different_lengths.padded_scores(models.book, [text])[0] for text in texts]
            return Scores(peers, tuple(right), skipped, rounds=self.rounds)
        exact = None
        if self.kind == "forward" or self.batch * self.tokens <= EXACT_TOKENS:
            with models.in_float64(), torch.no_grad():
                exact = peers["reference"]()
        if self.kind == "train":
            return Training(peers, exact, skipped, models=models)
        return Forward(peers, exact, skipped)


FULL = (
    Work("forward", "GPT-2 124M", 2, 4),
    Work("forward", "GPT-2 124M", 8, 128),
    Work("forward", "GPT-2 124M", 1, 1024, weigh=True),
    Work("train", "GPT-2 124M", 2, 256, weigh=True),
    Work("train", "GPT-2 124M", 2, 512, weigh=True),
    Work("decode", "GPT-2 124M", 1, 4, 32, uncached=True),
    Work("decode", "GPT-2 124M", 1, 128, 64),
    Work("decode", "GPT-2 124M", 8, 64, 32),
    Work("batch", "GPT-2 124M", 64, 120, 128, shortest=20, fewest=16, rounds=1),
    Work("score", "GPT-2 124M", 64, 500, shortest=50, rounds=1),
    Work("lookup", "GPT-2 124M in loops", 1, 128, 128),
    Work("lookup", "GPT-2 of bytes", 1, 128, 128, drawn=True),
    Work("forward", "toy", 4, 64),
    Work("train", "toy", 8, 64),
)
QUICK = (
    Work("forward", "toy", 1, 8),
    Work("forward", "toy", 4, 64),
    Work("train", "toy", 4, 64, weigh=True),
    Work("decode", "toy", 1, 8, 16, uncached=True),
    Work("decode", "toy", 1, 16, 16),
    Work("batch", "toy", 12, 12, 16, shortest=4, fewest=2),
    Work("score", "toy", 12, 32, shortest=4),
    Work("lookup", "toy", 1, 16, 16, drawn=True),
    Work("lookup", "toy in loops", 1, 32, 16),
)


class Models:
    """The peers' models of one config with the same weights, each made when first needed.

    Args:
        cfg: the model's sizes, in the book's form.
        alone: whether no model copies weights from the book's.
    """

    def __init__(self, cfg: dict[str, Any], alone: bool = False, seed: int = SEED) -> None:
        self.cfg, self.alone, self.seed = cfg, alone, seed
        self._others: dict[Peer, Any] = {}

    @cached_property
    def book(self) -> reference.GPTModel:
        torch.manual_seed(self.seed)
        return _foretelling(reference.GPTModel(self.cfg).eval(), self.cfg)

    @cached_property
    def fused(self) -> GPTModel:
        torch.manual_seed(self.seed)  # which draws the book's weights
        return _foretelling(GPTModel(self.cfg).eval(), self.cfg)

    @cached_property
    def torch(self) -> TorchGPT:
        return TorchGPT(self.book, self.cfg).eval()

    @cached_property
    def compiled(self) -> Any:
        return torch.compile(self.book, dynamic=False)

    @cached_property
    def hf(self) -> Any:
        return libraries.hugging_face(None if self.alone else self.book, self.cfg)

    @cached_property
    def ct2(self) -> Any:
        return libraries.ctranslate2_generator(self.hf)

    def other(self, peer: Peer) -> Any:
        """The model of an exported peer, or fastgpt's at a narrow precision: from ids to logits,
        and with a `generate`.
        """
        if peer not in self._others:
            if peer.engine == "fastgpt":
                made = Narrow(self.fused, peer.precision)
            else:
                made = EXPORTED[peer.engine](self.book, self.cfg, peer.precision)
            self._others[peer] = made
        return self._others[peer]

    def train(self, mode: bool) -> None:
        """Set the mode of the models made so far."""
        for name in ("book", "fused", "hf"):
            if name in self.__dict__:
                self.__dict__[name].train(mode)

    @contextmanager
    def in_float64(self) -> Iterator[None]:
        """Makes the book's model one in float64, and back, exactly: every float32 is a float64."""
        self.book.double()
        try:
            yield
        finally:
            self.book.float()


@lru_cache(maxsize=1)
def _models(config: str) -> Models:
    return Models(CONFIGS[config])


def _foretelling(model: Any, cfg: dict[str, Any]) -> Any:
    """The model. If its config has a loop or a source, its head foretells that."""
    if loop := cfg.get("loop"):
        foretold.foretell_loops(model, loop)
    if module := cfg.get("source"):
        foretold.foretell_text(model, foretold.source(module, SOURCE))
    return model


def _forward(work: Work, models: Models) -> Peers:
    ids = work.ids
    return {
        "reference": lambda: models.book(ids),
        "torch": lambda: models.torch(ids),
        "compile": lambda: models.compiled(ids),
        "hf": lambda: models.hf(ids, use_cache=False).logits,
        "products": _when_called(lambda: libraries.products(ids.numel(), work.cfg, ids.numel())),
        "fastgpt": lambda: models.fused(ids),
        **_others(lambda peer: models.other(peer)(ids)),
    }


def _train(work: Work, models: Models) -> Peers:
    ids = work.ids
    targets = ids.roll(-1, dims=1)

    def step(model: nn.Module, loss: Tensor) -> tuple[Tensor, ...]:
        loss.backward()
        gradients = tuple(p.grad for p in model.parameters() if p.grad is not None)
        model.zero_grad(set_to_none=True)
        return loss.detach(), *gradients

    def of_logits(model: Callable[[Tensor], Tensor]) -> Tensor:
        return F.cross_entropy(model(ids).flatten(0, 1), targets.flatten())

    @torch.enable_grad()
    def hugging_face() -> None:  # its gradients lie in other shapes
        step(models.hf, of_logits(lambda ids: models.hf(ids, use_cache=False).logits))

    with_grad = torch.enable_grad()
    return {
        "reference": with_grad(lambda: step(models.book, of_logits(models.book))),
        "compile": with_grad(lambda: step(models.book, of_logits(models.compiled))),
        "hf": hugging_face,
        "products": _when_called(
            lambda: libraries.products(ids.numel(), work.cfg, ids.numel(), backward=True)
        ),
        "fastgpt": with_grad(lambda: step(models.fused, of_logits(models.fused))),
        "loss": with_grad(lambda: step(models.fused, models.fused.loss(ids, targets))),
    }


def _decode(work: Work, models: Models) -> Peers:
    prompt, new, context = work.ids, work.new, work.cfg["context_length"]

    def products() -> Callable[[], None]:
        fill = libraries.products(prompt.numel(), work.cfg, head_rows=work.batch)
        step = libraries.products(work.batch, work.cfg, head_rows=work.batch)

        def run() -> None:
            fill()
            for _ in range(new - 1):
                step()

        return run

    cached = {"reference": lambda: CachedBook(models.book).generate(prompt, new)}
    if work.uncached:
        cached = {"cached": cached["reference"]}
        cached["reference"] = lambda: reference.generate_text_simple(
            models.book, prompt, new, context
        )
    return {
        **cached,
        "torch": lambda: models.torch.generate(prompt, new),
        "hf": lambda: libraries.hugging_face_text(models.hf, prompt, new),
        "ct2": lambda: libraries.ctranslate2_text(models.ct2, prompt, new),
        "products": _when_called(products),
        "fastgpt": lambda: generate_text_simple(models.fused, prompt, new, context),
        **_others(lambda peer: models.other(peer).generate(prompt, new)),
    }


def _lookup(work: Work, models: Models) -> Peers:
    prompt, new, context = work.ids, work.new, work.cfg["context_length"]
    return {
        "plain": lambda: generate_text_simple(
            models.fused, prompt, new, context, prompt_lookup=False
        ),
        "hf": lambda: libraries.hugging_face_text(
            models.hf, prompt, new, prompt_lookup_num_tokens=GUESSES
        ),
        "ct2": lambda: libraries.ctranslate2_text(models.ct2, prompt, new),
        "fastgpt": lambda: generate_text_simple(models.fused, prompt, new, context),
    }


def _drawn(work: Work, models: Models) -> Peers:
    prompt, new, context = work.ids, work.new, work.cfg["context_length"]

    def draw(prompt_lookup: bool) -> Tensor:
        model = models.fused  # may be made now, which draws as well
        torch.manual_seed(SEED)
        return generate(model, prompt, new, context, 1.0, prompt_lookup=prompt_lookup)

    return {"plain": lambda: draw(False), "fastgpt": lambda: draw(True)}


def _batch(work: Work, models: Models) -> Peers:
    prompts, counts, context = work.texts, work.counts, work.cfg["context_length"]

    def one_by_one() -> tuple[Tensor, ...]:
        return tuple(
            generate_text_simple(models.fused, prompt[None], new, context, prompt_lookup=False)[0]
            for prompt, new in zip(prompts, counts, strict=True)
        )

    def together() -> tuple[Tensor, ...]:
        texts = generate_batch(models.fused, prompts, counts, batch_size=BATCH)
        return tuple(map(torch.tensor, texts))

    return {
        "plain": one_by_one,
        "hf": lambda: different_lengths.hugging_face_texts(models.hf, prompts, counts),
        "ct2": lambda: different_lengths.ctranslate2_texts(models.ct2, prompts, counts),
        "fastgpt": together,
    }


def _score(work: Work, models: Models) -> Peers:
    texts, padded = work.texts, different_lengths.padded_scores
    return {
        "reference": lambda: padded(models.book, texts),
        "hf": lambda: padded(lambda ids: models.hf(ids, use_cache=False).logits, texts),
        "ct2": lambda: different_lengths.ctranslate2_scores(models.ct2, texts),
        "fastgpt": lambda: tuple(score(models.fused, texts)),
    }


def _others(run: Callable[[Peer], Tensor]) -> Peers:
    """The work of the peers that `Models.other` makes."""
    return {
        name: partial(run, peer)
        for name, peer in PEERS.items()
        if peer.engine in EXPORTED or (peer.engine == "fastgpt" and not peer.is_float32)
    }


def _when_called(make: Callable[[], Callable[[], None]]) -> Callable[[], None]:
    """Calls what `make` returns; it is made at the first call."""
    made = lru_cache(maxsize=1)(make)
    return lambda: made()()
