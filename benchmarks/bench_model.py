"""The whole model: forward passes, training steps and greedy generation.

The reference of generation is the book's model with a cache: its own loop, which runs the whole
sequence again for each token, takes some ten times as long.
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
)


def _of(kind):
    works = [work for work in WORKS if work.kind == kind]
    return {work.name: work.case for work in works}, works[0].peer_names


(FORWARD, _forward_peers), (TRAIN, _train_peers), (DECODE, _decode_peers) = map(
    _of, ("forward", "train", "decode")
)
test_forward = benchmark_of(FORWARD, _forward_peers)
test_train = benchmark_of(TRAIN, _train_peers)
test_decode = benchmark_of(DECODE, _decode_peers)
