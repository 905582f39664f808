"""Several Python threads at once: each has the bits that its call has alone. `make sanitize` runs
these under ThreadSanitizer too.
"""

import copy
import threading

import pytest
import torch

import fastgpt
from fastgpt import GPT_CONFIG_124M, GPTModel, KVCache, ops, use_backend
from fastgpt.model.cache import Slot, extended

CPU = fastgpt.backends()["cpu"]
pytestmark = pytest.mark.skipif(not CPU.available, reason=str(CPU.reason))
CFG = GPT_CONFIG_124M | {
    "vocab_size": 211,
    "context_length": 120,
    "emb_dim": 96,
    "n_heads": 3,
    "n_layers": 2,
    "drop_rate": 0.0,
}
PRECISIONS = (torch.float32, torch.bfloat16, "int8", "int8-dynamic", "int4")
ROUNDS = 3


def model_of(precision):
    model = GPTModel(CFG).eval()
    if isinstance(precision, str):
        return fastgpt.quantize(model, precision)
    return model.to(precision)


def at_once(calls, rounds=ROUNDS):
    """What each call gives in each round, in a Python thread of its own, on 1 to 4 threads."""
    results, errors, start = [[] for _ in calls], [], threading.Barrier(len(calls))

    def run(number, call):
        try:
            torch.set_num_threads(1 + number % 4)
            with use_backend("cpu"):
                start.wait(timeout=60)
                for _ in range(rounds):
                    results[number].append(call())
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=pair) for pair in enumerate(calls)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors, errors
    return results


def check_at_once(*calls):
    """That each call, which gives a list of tensors, has the bits at once that it has alone."""
    with use_backend("cpu"):
        alone = [call() for call in calls]
    for expected, rounds in zip(alone, at_once(calls), strict=True):
        for made in rounds:
            assert all(map(torch.equal, made, expected))


def forward_of(model, rows, tokens):
    ids = torch.randint(CFG["vocab_size"], (rows, tokens))

    @torch.no_grad()
    def call():
        return [model(ids)]

    return call


@pytest.mark.parametrize("precision", PRECISIONS, ids=str)
def test_one_model(precision):
    model = model_of(precision)
    shapes = ((2, 110), (2, 110), (1, 1), (2, 110))
    check_at_once(*(forward_of(model, *shape) for shape in shapes))


def test_several_models():
    check_at_once(*(forward_of(model_of(precision), 2, 70) for precision in PRECISIONS))


def test_packed_texts():
    model = model_of(torch.float32)
    texts = [torch.randint(CFG["vocab_size"], (n,)).tolist() for n in (3, 40, 1, 21)]

    def call():
        return [torch.tensor(t) for t in fastgpt.generate_batch(model, texts, max_new_tokens=4)]

    check_at_once(call, call, call)


@pytest.mark.parametrize("autocast", [False, True])
def test_training_steps(autocast):
    def step_of(model):
        ids = torch.randint(CFG["vocab_size"], (2, 60))

        def call():
            model.zero_grad()
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
                loss = model.loss(ids, ids.roll(-1, 1))
            loss.backward()
            return [loss.detach(), *(p.grad.clone() for p in model.parameters())]

        return call

    check_at_once(*(step_of(GPTModel(CFG)) for _ in range(4)))


def test_operations():
    def call_of(seed):
        torch.manual_seed(seed)
        tensors = torch.randn(150, 96), torch.randn(130, 96), torch.randn(130)
        tensors += torch.randn(3, 2, 3, 90, 32).unbind()
        ids, tables = torch.randint(50, (3, 40)), (torch.randn(50, 96), torch.randn(60, 96))

        def call():
            x, w, b, q, k, v, tok, pos = (t.clone().requires_grad_() for t in (*tensors, *tables))
            y = ops.bias_gelu(ops.layer_norm(ops.linear(x, w, b), b, b, 1e-5), b)
            loss = ops.linear_cross_entropy(x, w, torch.arange(150) % 130)
            parts = y, ops.causal_attention(q, k, v), loss, ops.embedding(ids, tok, pos)
            sum(part.square().sum() for part in parts).backward()
            return [part.detach() for part in parts] + [t.grad for t in (x, w, b, q, k, v, tok)]

        return call

    check_at_once(*map(call_of, range(4)))


def test_models_that_come_and_go():
    """A workspace goes with its model while others look for an idle one."""
    kept, ids = GPTModel(CFG).eval(), torch.randint(CFG["vocab_size"], (1, 30))

    @torch.no_grad()
    def fresh():
        return [copy.deepcopy(kept)(ids)]

    @torch.no_grad()
    def old():
        return [kept(ids)]

    check_at_once(fresh, old, fresh, old)


def test_two_threads_go_on_from_one_cache(monkeypatch):
    """A prompt's cache that several conversations begin with: one of them takes its blocks."""
    begun = extended(None, *torch.randn(2, 1, 3, 10, 8), limit=64)
    looking = threading.Barrier(2)

    def both_look(blocks):
        seen = blocks.__dict__["written"]
        try:
            looking.wait(timeout=0.5)
        except threading.BrokenBarrierError:  # the other one waits for its turn
            looking.reset()
        return seen

    def look(blocks, value):
        blocks.__dict__["written"] = value

    monkeypatch.setattr(type(begun.blocks), "written", property(both_look, look), raising=False)
    more = torch.randn(2, 2, 1, 3, 1, 8)
    made = at_once([lambda i=i: extended(begun, *more[i], limit=64) for i in (0, 1)], rounds=1)
    for ((keys, values),), (new_keys, new_values) in zip(made, more, strict=True):
        assert torch.equal(keys[:, :, 10:], new_keys)
        assert torch.equal(values[:, :, 10:], new_values)


def test_conversations():
    """Each with a cache of its own, that began as a copy of one."""
    model, prompt = model_of(torch.float32), torch.randint(CFG["vocab_size"], (1, 20))
    begun = KVCache(CFG["n_layers"])
    with torch.no_grad(), use_backend("cpu"):
        model(prompt, cache=begun)
    assert isinstance(begun.get(0), Slot)

    def conversation(seed):
        ids = torch.randint(CFG["vocab_size"], (6,), generator=torch.Generator().manual_seed(seed))

        @torch.no_grad()
        def call():
            cache = KVCache(CFG["n_layers"])
            cache.cache[:] = begun.get_all()
            return [model(token.view(1, 1), cache=cache) for token in ids]

        return call

    check_at_once(*map(conversation, range(4)))
