"""The whole model: forward passes, training steps, generation and the scores of texts.

The reference of generation is the book's model with a cache: its own loop, which runs the whole
sequence again for each token, takes some ten times as long. Many prompts, and guesses, are compared
with fastgpt's own loop for one prompt, a token a pass.
"""

from benchmarks.cases import benchmark_of
from fastgpt.bench.workloads import Work

WORKS = (
    Work("forward", "GPT-2 124M", 2, 4),
    Work("forward", "GPT-2 124M", 8, 8),
    Work("forward", "GPT-2 124M", 8, 128),
    Work("forward", "GPT-2 124M", 1, 1024),
    Work("forward", "toy", 4, 64),
    Work("train", "GPT-2 124M, no dropout", 2, 256),
    Work("train", "GPT-2 124M, no dropout", 2, 512),
    Work("train", "GPT-2 124M", 2, 512),
    Work("train", "toy", 8, 64),
    Work("decode", "GPT-2 124M", 1, 128, 64),
    Work("decode", "GPT-2 124M", 8, 64, 32),
    Work("batch", "GPT-2 124M", 64, 120, 128, shortest=20, fewest=16, rounds=3),
    Work("score", "GPT-2 124M", 64, 500, shortest=50, rounds=3),
    Work("lookup", "GPT-2 124M in loops", 1, 128, 128),
    Work("lookup", "GPT-2 124M of source", 1, 256, 256),
    Work("lookup", "GPT-2 of bytes", 1, 128, 128, drawn=True),
)


def _of(kind):
    works = [work for work in WORKS if work.kind == kind]
    return {work.name: work.case for work in works}, works[0].peer_names


FORWARD, _forward_peers = _of("forward")
TRAIN, _train_peers = _of("train")
DECODE, _decode_peers = _of("decode")
BATCH, _batch_peers = _of("batch")
SCORE, _score_peers = _of("score")
LOOKUP, _lookup_peers = _of("lookup")
test_forward = benchmark_of(FORWARD, _forward_peers)
test_train = benchmark_of(TRAIN, _train_peers)
test_decode = benchmark_of(DECODE, _decode_peers)
test_batch = benchmark_of(BATCH, _batch_peers)
test_score = benchmark_of(SCORE, _score_peers)
test_lookup = benchmark_of(LOOKUP, _lookup_peers)
