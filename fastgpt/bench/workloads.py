"""The work that is measured on the whole model: forward passes, training steps and greedy
generation.
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

from fastgpt import GPT_CONFIG_124M, GPTModel, generate_text_simple, reference
from fastgpt.bench import libraries
from fastgpt.bench.bound import bound_seconds, forward_flops, weight_bytes
from fastgpt.bench.cached_book import CachedBook
from fastgpt.bench.case import Case
from fastgpt.bench.errors import Result, kl_divergence
from fastgpt.bench.llama import LlamaCpp
from fastgpt.bench.narrow import Narrow
from fastgpt.bench.onednn import onednn
from fastgpt.bench.onnx_runtime import OnnxRuntime
from fastgpt.bench.openvino import OpenVino
from fastgpt.bench.peers import PEERS, Peer
from fastgpt.bench.torch_gpt import TorchGPT

CONFIGS = {
    "GPT-2 124M": GPT_CONFIG_124M,
    "GPT-2 124M, no dropout": GPT_CONFIG_124M | {"drop_rate": 0.0},
    "toy": GPT_CONFIG_124M
    | {"vocab_size": 256, "context_length": 64, "emb_dim": 64, "n_heads": 2, "n_layers": 2},
}
SEED = 123
TIE = 1e-4  # logits this close may change places in float32
EXACT_TOKENS = 512  # a training step on more tokens is not repeated in float64

EXPORTED: dict[str, Callable[..., Any]] = {  # made of the book's model, its config, a precision
    "onednn": onednn,
    "onnx": OnnxRuntime,
    "llama": LlamaCpp,
    "openvino": OpenVino,
}

Peers = dict[str, Callable[[], Result | None]]


@dataclass(frozen=True)
class Work:
    """One piece of work on token ids [batch, tokens]."""

    kind: str  # forward, train (forward and backward), or decode (greedy)
    config: str  # of CONFIGS
    batch: int
    tokens: int
    new: int = 0  # tokens to decode
    uncached: bool = False  # decode: the reference is the book's own loop, without a cache
    weigh: bool = False  # whether to measure the peers' peak memory

    @property
    def name(self) -> str:
        more = f" + {self.new}" if self.new else ""
        loop = ", the book's loop" if self.uncached else ""
        return f"{self.kind} {self.config} [{self.batch}, {self.tokens}]{more}{loop}"

    @property
    def tokens_done(self) -> int:
        return self.batch * (self.new or self.tokens)

    @property
    def cfg(self) -> dict[str, Any]:
        return CONFIGS[self.config]

    @property
    def bound(self) -> float | None:
        """The seconds that no code for this machine can beat; None if the peaks are not measured.

        Every pass reads each weight once, and each new token takes a pass.
        """
        cfg, batch = self.cfg, self.batch
        weights = weight_bytes(cfg)
        if self.kind != "decode":
            times = 3 if self.kind == "train" else 1
            return bound_seconds(times * batch * forward_flops(cfg, self.tokens), weights)
        operations = [batch * forward_flops(cfg, self.tokens, head_rows=1)]
        operations += [batch * forward_flops(cfg, 1, self.tokens + n) for n in range(self.new - 1)]
        passes = [bound_seconds(flops, weights) for flops in operations]
        return sum(seconds for seconds in passes if seconds is not None) or None

    @property
    def ids(self) -> Tensor:
        """The token ids, [batch, tokens]."""
        torch.manual_seed(SEED)
        return torch.randint(1, self.cfg["vocab_size"], (self.batch, self.tokens))  # 0 is HF's pad

    def peers(self, models: Models) -> Peers:
        """How each peer does the work. What a peer needs is made when it first runs."""
        kinds = {"forward": _forward, "train": _train, "decode": _decode}
        return kinds[self.kind](self, models, self.ids)

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
        if self.kind == "decode":
            return Generation(peers, None, skipped, models=models, prompt=self.ids)
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
    Work("forward", "toy", 4, 64),
    Work("train", "toy", 8, 64),
)
QUICK = (
    Work("forward", "toy", 1, 8),
    Work("forward", "toy", 4, 64),
    Work("train", "toy", 4, 64, weigh=True),
    Work("decode", "toy", 1, 8, 16, uncached=True),
    Work("decode", "toy", 1, 16, 16),
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
        return reference.GPTModel(self.cfg).eval()

    @cached_property
    def fused(self) -> GPTModel:
        torch.manual_seed(self.seed)  # which draws the book's weights
        return GPTModel(self.cfg).eval()

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


def _forward(work: Work, models: Models, ids: Tensor) -> Peers:
    return {
        "reference": lambda: models.book(ids),
        "torch": lambda: models.torch(ids),
        "compile": lambda: models.compiled(ids),
        "hf": lambda: models.hf(ids, use_cache=False).logits,
        "products": _when_called(lambda: libraries.products(ids.numel(), work.cfg, ids.numel())),
        "fastgpt": lambda: models.fused(ids),
        **_others(lambda peer: models.other(peer)(ids)),
    }


def _train(work: Work, models: Models, ids: Tensor) -> Peers:
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


def _decode(work: Work, models: Models, prompt: Tensor) -> Peers:
    new, context = work.new, work.cfg["context_length"]
    words = [list(map(str, row)) for row in prompt.tolist()]

    def products() -> Callable[[], None]:
        fill = libraries.products(prompt.numel(), work.cfg, head_rows=work.batch)
        step = libraries.products(work.batch, work.cfg, head_rows=work.batch)

        def run() -> None:
            fill()
            for _ in range(new - 1):
                step()

        return run

    def hugging_face() -> Tensor:
        ids: Tensor = models.hf.generate(
            prompt, max_new_tokens=new, min_new_tokens=new, do_sample=False, pad_token_id=0
        )
        return ids

    def ctranslate2() -> Tensor:
        results = models.ct2.generate_batch(
            words, max_length=new, min_length=new, beam_size=1, include_prompt_in_result=False
        )
        return torch.cat((prompt, torch.tensor([r.sequences_ids[0] for r in results])), dim=1)

    cached = {"reference": lambda: CachedBook(models.book).generate(prompt, new)}
    if work.uncached:
        cached = {"cached": cached["reference"]}
        cached["reference"] = lambda: reference.generate_text_simple(
            models.book, prompt, new, context
        )
    return {
        **cached,
        "torch": lambda: models.torch.generate(prompt, new),
        "hf": hugging_face,
        "ct2": ctranslate2,
        "products": _when_called(products),
        "fastgpt": lambda: generate_text_simple(models.fused, prompt, new, context),
        **_others(lambda peer: models.other(peer).generate(prompt, new)),
    }


def _others(run: Callable[[Peer], Tensor]) -> Peers:
    """The work of the peers that `Models.other` makes."""
    return {
        name: partial(run, peer)
        for name, peer in PEERS.items()
        if peer.engine in EXPORTED or (peer.is_ours and not peer.is_float32)
    }


def _when_called(make: Callable[[], Callable[[], None]]) -> Callable[[], None]:
    """Calls what `make` returns; it is made at the first call."""
    made = lru_cache(maxsize=1)(make)
    return lambda: made()()


class Forward(Case):
    """A forward pass: its logits are also judged by the distributions of next tokens."""

    def distances(self, got: Result) -> dict[str, float]:
        """The largest error of a logit, and the mean and the largest KL divergence."""
        assert isinstance(got, Tensor)
        assert isinstance(self.exact, Tensor)
        mean, largest = kl_divergence(got, self.exact)
        return super().distances(got) | {"kl_mean": mean, "kl_largest": largest}


class Training(Case):
    """A training step: timed with the config's dropout, its errors measured without."""

    def __init__(self, *args: Any, models: Models) -> None:
        super().__init__(*args)
        self.models = models

    def errors(self, peer: str) -> dict[str, float]:
        self.models.train(False)
        errors = super().errors(peer)
        self.models.train(True)
        return errors


class Generation(Case):
    """Generated tokens: the model in float64 judges them, fed those very tokens."""

    def __init__(self, *args: Any, models: Models, prompt: Tensor) -> None:
        super().__init__(*args)
        self.models, self.prompt = models, prompt
        self.judged: list[tuple[Tensor, float]] = []

    def distances(self, got: Result) -> dict[str, float]:
        """The most by which a chosen token's logit lies below the greatest of its step."""
        assert isinstance(got, Tensor)
        for ids, known in self.judged:
            if torch.equal(ids, got):
                return {"error": known}
        start = self.prompt.shape[1]
        assert torch.equal(got[:, :start], self.prompt)
        with self.models.in_float64():
            logits = self.models.book(got[:, :-1])[:, start - 1 :]
        chosen = logits.gather(-1, got[:, start:, None])[..., 0]
        error: float = (logits.amax(-1) - chosen).max().item()
        self.judged.append((got, error))
        return {"error": error}

    def fault(self) -> str | None:
        """What is wrong if fastgpt chose a token that is not the likeliest; None if it did not."""
        ours = self.error("fastgpt")
        if ours is None or ours <= TIE:
            return None
        return f"fastgpt chose a token whose logit is {ours:.2e} below the greatest"
