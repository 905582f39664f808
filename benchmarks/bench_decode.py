"""Greedy generation by GPT-2 124M: a prompt, then new tokens one by one.

The reference is the book's model with a cache; its plain loop runs the whole sequence again for
each token, and takes some ten times as long. The floor is the prompt's products, then every weight
read once a token.
"""

from functools import lru_cache, partial

import pytest
import torch
from torch import Tensor, nn

from benchmarks import libraries
from benchmarks.cached_book import CachedBook
from benchmarks.case import ALL_PEERS, Case
from fastgpt import GPT_CONFIG_124M, GPTModel, generate_text_simple, reference

CFG = GPT_CONFIG_124M
SIZES = ((1, 128, 64), (8, 64, 32))  # batch, tokens of the prompt, new tokens
TIE = 1e-4  # logits this close may change places in float32


class Generation(Case):
    """`exact` is unused: a result is judged by the model in float64, fed that very result."""

    def __init__(self, peers, book: nn.Module, prompt: Tensor, skipped: dict[str, str]) -> None:
        super().__init__(peers, prompt, skipped)
        self.book, self.judged = book, []

    def distance(self, got: Tensor) -> float:
        """How far a chosen token's logit lies at most below the greatest of its step; 0 if none."""
        for ids, error in self.judged:
            if torch.equal(ids, got):
                return error
        prompt = self.exact
        assert torch.equal(got[:, : prompt.shape[1]], prompt)
        logits = self.book.double()(got[:, :-1])[:, prompt.shape[1] - 1 :]
        self.book.float()  # and back, exactly: every float32 is a float64
        chosen = logits.gather(-1, got[:, prompt.shape[1] :, None])[..., 0]
        error = (logits.amax(-1) - chosen).max().item()
        self.judged.append((got, error))
        return error

    def check(self) -> None:
        """Raise AssertionError if fastgpt chose a token that is not the likeliest."""
        ours = self.error("fastgpt")
        assert ours <= TIE, f"fastgpt chose a token whose logit is {ours:.2e} below the greatest"


@lru_cache(maxsize=1)
def models():
    torch.manual_seed(123)
    book, fused = reference.GPTModel(CFG).eval(), GPTModel(CFG).eval()
    fused.load_state_dict(book.state_dict())
    missing_hf = libraries.missing("transformers")
    missing_ct2 = libraries.missing("transformers", "ctranslate2")
    hf = None if missing_hf else libraries.hugging_face(book, CFG)
    ct2 = None if missing_ct2 else libraries.ctranslate2_generator(hf)
    skipped = {"hf": missing_hf, "ct2": missing_ct2}
    return book, fused, hf, ct2, {peer: reason for peer, reason in skipped.items() if reason}


def decode(batch: int, tokens: int, new: int) -> Case:
    book, fused, hf, ct2, skipped = models()
    prompt = torch.randint(1, CFG["vocab_size"], (batch, tokens))  # 0 is what transformers pads by
    cached = CachedBook(book)
    fill = libraries.products(batch * tokens, CFG, head_rows=batch)
    weights = [p.detach().flatten() for n, p in book.named_parameters() if "_emb" not in n]
    flat = torch.cat(weights)

    def floor() -> None:
        fill()
        for _ in range(new - 1):
            flat.sum()

    def hugging_face() -> Tensor:
        return hf.generate(
            prompt, max_new_tokens=new, min_new_tokens=new, do_sample=False, pad_token_id=0
        )

    words = [list(map(str, row)) for row in prompt.tolist()]

    def ctranslate2() -> Tensor:
        results = ct2.generate_batch(
            words, max_length=new, min_length=new, beam_size=1, include_prompt_in_result=False
        )
        return torch.cat((prompt, torch.tensor([r.sequences_ids[0] for r in results])), dim=1)

    peers = {
        "reference": lambda: cached.generate(prompt, new),
        "hf": hugging_face,
        "ct2": ctranslate2,
        "floor": floor,
        "fastgpt": lambda: generate_text_simple(fused, prompt, new, CFG["context_length"]),
    }
    runnable = {peer: run for peer, run in peers.items() if peer not in skipped}
    return Generation(runnable, book, prompt, skipped)


CASES = {
    f"decode [{batch}, {tokens}] + {new}": partial(decode, batch, tokens, new)
    for batch, tokens, new in SIZES
}


@pytest.mark.parametrize("peer", [p for p in ALL_PEERS if p not in ("torch", "compile")])
@pytest.mark.parametrize("name", CASES)
def test_decode(measure, name, peer):
    measure(name, CASES[name], peer)
