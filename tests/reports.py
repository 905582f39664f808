"""A document as `fastgpt bench` writes it, of every peer and all work, with made-up figures."""

from fastgpt.bench import measure
from fastgpt.bench.peers import PEERS, PRECISIONS
from fastgpt.bench.workloads import FULL

FACTS = {
    "backend": "cpu",
    "isa": "avx512",
    "threads": 64,
    "fastgpt": "0.1.0",
    "torch": "2.13.0+cpu",
    "python": "3.14.0",
    "system": "Linux x86_64",
    "cpu": "Some Maker(R) Long-Named(R) Processor 9999-Series CPU @ 3.00GHz with Everything",
}
UNSTEADY = "a quarter of its rounds took under 1.00 s, another over 2.00 s"


def full_document():
    """The largest page there can be: bars from a tenth to a hundred times the book's speed."""
    return {
        "command": "bench",
        "format": measure.FORMAT,
        "date": "2026-01-31",
        "machine": FACTS,
        "peaks": {"flops": 5.5e12, "bandwidth": 4.1e11},
        "agree": False,
        "left_out": {"compile": "torch.compile finds no C++ compiler"},
        "works": [_row(number, work) for number, work in enumerate(FULL)],
        "quality": [
            {
                "precision": precision,
                "perplexity": 4 + number,
                "change": number / 4,
                "kl_mean": number * 1e-5,
                "kl_largest": number * 1e-4,
            }
            for number, precision in enumerate(PRECISIONS)
        ],
    }


def _row(number, work):
    peers = [peer for peer in PEERS if peer in work.peer_names]
    speeds = [1.0, *(0.1 * 10 ** (3 * i / len(peers)) for i in range(1, len(peers)))]
    return {
        "name": work.name,
        "kind": work.kind,
        "config": work.config,
        "size": work.size,
        "uncached": work.uncached,
        "base": peers[0],
        "rounds": 5,
        "others": 12.5 if number == 1 else 0.0,
        "doubt": "other programs kept 12.5 of 64 processors busy" if number == 1 else None,
        "bound": None if work.kind == "lookup" else 0.003,
        "fault": "fastgpt is off by 1.00e-02, the reference by 1.00e-06" if number == 0 else None,
        "peers": {
            peer: {
                "seconds": 1 / speed,
                "quartiles": [0.9 / speed, 1.2 / speed],
                "doubt": UNSTEADY if number == 2 and peer == "torch" else None,
                "speed_up": speed,
                "share_of_bound": _share(work, peer, speed),
                "tokens_per_second": 1000 * speed,
                "error": None if peer == "products" else 1e-6 / speed,
                **({"kl_mean": 1e-7, "kl_largest": 1e-6} if work.kind == "forward" else {}),
                **({"memory": int(6e9 / speed)} if work.weigh else {}),
            }
            for peer, speed in zip(peers, speeds, strict=True)
        },
    }


def _share(work, peer, speed):
    return 0.003 * speed if PEERS[peer].is_float32 and work.kind != "lookup" else None
