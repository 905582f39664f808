import pytest
import torch
from torch.nn import functional as F

from fastgpt.triton.cross_entropy import cross_entropy, cross_entropy_backward
from on_triton.support.cases import DTYPE_IDS, DTYPES, Case, empty
from on_triton.support.compare import check

pytestmark = pytest.mark.usefixtures("interpreted")

IGNORE = -100


def _torch(targets):
    return lambda logits: F.cross_entropy(
        logits, targets.long(), ignore_index=IGNORE, reduction="none"
    )


def _targets(n_rows, vocabulary, padded):
    targets = torch.randint(vocabulary, (n_rows,))
    targets[1::3] = IGNORE
    return padded(targets)


@pytest.mark.parametrize("dtype", DTYPES, ids=DTYPE_IDS)
@pytest.mark.parametrize("vocabulary", [1, 17, 4096, 9001])
def test_cross_entropy(padded, vocabulary, dtype):
    logits = padded((torch.randn(5, vocabulary) * 3).to(dtype), past_row=7)
    targets, dloss = _targets(5, vocabulary, padded), padded(torch.randn(5))
    loss, lse, kept = padded.empty(5), padded.empty(5, dtype=torch.float64), logits.clone()
    cross_entropy(logits, targets, IGNORE, loss, lse)
    assert torch.equal(logits, kept)
    cross_entropy_backward(logits, targets, IGNORE, lse, dloss)
    check((loss, logits), _torch(targets), (kept,), [dloss])
    torch.testing.assert_close(lse, kept.double().logsumexp(-1), rtol=1e-6, atol=1e-6)
    assert not logits[1::3].any()


def test_one_upstream_for_all_rows(padded):
    logits, targets = torch.randn(5, 33), torch.randint(33, (5,), dtype=torch.int32)
    loss, lse, kept = padded.empty(5), padded.empty(5), logits.clone()
    cross_entropy(logits, targets, IGNORE, loss, lse)
    cross_entropy_backward(logits, targets, IGNORE, lse, torch.tensor([0.25]).expand(5))
    exact = kept.double().softmax(-1) - F.one_hot(targets.long(), 33)
    torch.testing.assert_close(logits, (exact / 4).float(), rtol=1e-5, atol=1e-6)


def test_minus_infinity_and_large_logits(padded):
    logits = padded(torch.randn(4, 9001))
    logits[0, :8192] = -torch.inf  # more than a block
    logits[1, 5], logits[2, 7], logits[3, 3] = 1e30, torch.nan, torch.inf
    targets, kept = torch.full((4,), 9000), logits.clone()
    loss, lse = padded.empty(4), padded.empty(4)
    cross_entropy(logits, targets, IGNORE, loss, lse)
    exact = _torch(targets)(kept)
    torch.testing.assert_close(loss[:2], exact[:2])
    assert loss[2:].isnan().tolist() == exact[2:].isnan().tolist()
    cross_entropy_backward(logits, targets, IGNORE, lse, torch.ones(4))
    assert logits[:2].isfinite().all()
    assert not logits[0, :8192].any()


def test_a_target_outside_the_vocabulary_reads_nothing(padded):
    logits, loss, lse = padded(torch.randn(3, 17)), padded.empty(3), padded.empty(3)
    cross_entropy(logits, torch.tensor([17, -1, 10**9]), IGNORE, loss, lse)
    assert loss.isnan().all()


def test_no_rows():
    nothing, none = torch.empty(0, 17), torch.empty(0)
    cross_entropy(nothing, none.long(), IGNORE, none, none)
    cross_entropy_backward(nothing, none.long(), IGNORE, none, none)


def _run(dtype):
    logits = empty(dtype, 512, 50304)[:, :50257]
    targets, loss = empty(torch.int64, 512), empty(torch.float32, 512)
    lse = empty(torch.float64 if dtype == torch.float32 else torch.float32, 512)
    cross_entropy(logits, targets, IGNORE, loss, lse)
    cross_entropy_backward(logits, targets, IGNORE, lse, loss)


CASES = {
    "both": Case(
        _run,
        wide=("cross_entropy_fwd_kernel", "cross_entropy_bwd_kernel"),
        sample=("bfloat16", "float32"),
    )
}
