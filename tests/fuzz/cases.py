"""What random calls share: sizes, layouts, and the check of a call against float64."""

import contextlib
import itertools
import math

import torch
from hypothesis import assume
from hypothesis import strategies as st

from fastgpt import cpu
from fastgpt.bench.errors import TIMES, as_tuple
from fuzz import tried
from fuzz.guards import Layout

# Primes, and around the vectors, the tiles and the rows that products take as few.
SMALL = [1, 2, 3, 5, 7, 8, 13, 15, 16, 17, 24, 25, 31, 32, 33, 47, 48, 49, 63, 64, 65, 0]
LARGE = [96, 97, 127, 128, 129, 191, 193, 256, 257, 300]
sizes = st.one_of(*[st.sampled_from(SMALL)] * 7, st.sampled_from(LARGE))
lengths = st.one_of(*[st.sampled_from(SMALL[:-1])] * 15, st.sampled_from(LARGE))
widths = sizes.filter(bool)
few = st.sampled_from([1, 2, 3, 0])
seeds = st.integers(0, 2**32 - 1)
threads = st.integers(2, 8)
masks = st.integers(0, 255)
dtypes = st.sampled_from([torch.float32] * 6 + [torch.bfloat16, torch.float16, torch.float64])
probabilities = st.sampled_from([0.0, 0.0, 0.1, 0.5, 0.9, 0.999, 1.0])
layouts = st.builds(
    Layout,
    st.sampled_from([0, 0, 0, 1, 2]),
    st.tuples(*[st.sampled_from([1, 1, 1, 2, 3])] * 4),
    st.integers(0, 5),
    st.sampled_from([-1, -1, -1, -1, 0, 1, 2]),
)
many_layouts = st.lists(layouts, min_size=8, max_size=8)

_SIBLINGS = 200  # of a case of few numbers; of more there are fewer
_SIBLINGS_IN_NORM = 50  # which leaves less to luck
_LARGEST = 1 << 16  # numbers in a case
_SMALL = 1 << 12  # numbers up to which a case runs on every instruction set
_LUCK = 8  # times the allowed error, past which no luck explains it ..
_OF_FLOAT64 = 1e-14  # where 1 + tanh(x) is nothing but its rounding, of numbers around 1
_FEW = 3  # .. once so many siblings were measured: PyTorch's error may be nought by chance
_OF_LAYOUTS = 64  # times PyTorch's measure, of which its own may be off on another layout


@contextlib.contextmanager
def thread_count(n):
    before = torch.get_num_threads()
    torch.set_num_threads(n)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def numbers(seed):
    """A function of a shape: normal float32 numbers."""
    generator = torch.Generator().manual_seed(seed)
    return lambda *shape: torch.randn(shape, generator=generator)


def call(f, tensors, wanted=(), upstream=None):
    """The outputs of f, and the gradients of the tensors that want one; without any, of a call
    that records none.
    """
    wanted = [w for w, _ in itertools.zip_longest(wanted, tensors, fillvalue=False)]
    leaves = [t.detach().requires_grad_(w) for t, w in zip(tensors, wanted, strict=True)]
    if not any(wanted):
        with torch.no_grad():
            return [(f"output {i}", y) for i, y in enumerate(as_tuple(f(*leaves)))]
    with torch.enable_grad():
        outputs = as_tuple(f(*leaves))
        found = [(f"output {i}", y.detach()) for i, y in enumerate(outputs)]
        ask = [(y, u.to(y.dtype)) for y, u in zip(outputs, upstream, strict=True)]
        ask = [(y, u) for y, u in ask if y.requires_grad]
        inputs = [leaf for leaf in leaves if leaf.requires_grad]
        gradients = torch.autograd.grad([y for y, _ in ask], inputs, [u for _, u in ask])
    names = [f"gradient {i}" for i, w in enumerate(wanted) if w]
    return found + list(zip(names, gradients, strict=True))


class Attention(torch.autograd.Function):
    """By PyTorch's operations, with the backward pass in the form of its fused attention: what a
    row of the softmax takes away is dout * out, not the sum over keys. Where a weight is near 1
    the gradients of q and k are then nothing but the rounding of that, which a form that holds all
    weights does not have.
    """

    @staticmethod
    def forward(ctx, q, k, v, scale, keep):
        T, S = q.shape[2], k.shape[2]
        hidden = torch.ones(T, S, dtype=torch.bool).triu(S - T + 1)
        p = (q @ k.mT * scale).masked_fill(hidden, -torch.inf).softmax(-1)
        keep = keep.to(q.dtype)
        out = (p * keep) @ v
        ctx.save_for_backward(q, k, v, p, keep, out)
        ctx.scale = scale
        return out

    @staticmethod
    def backward(ctx, dout):
        q, k, v, p, keep, out = ctx.saved_tensors
        dp = dout @ v.mT * keep
        ds = p * (dp - (dout * out).sum(-1, keepdim=True)) * ctx.scale
        return ds @ k, ds.mT @ q, (p * keep).mT @ dout, None, None


class Rule:
    """The error rule for one case: twice PyTorch's error and one rounding.

    Of few numbers PyTorch's largest error is a matter of luck. So where ours is larger, PyTorch's
    is also measured on the same numbers, and gradients of outputs, moved by some roundings, which
    are as well conditioned; an element that stands for many moves as one.
    times: how much more than that is allowed. in_norm: whether the gradients are one, and an error
    the norm of all its differences.
    """

    def __init__(self, theirs, tensors, upstream, times, in_norm=False):
        self.times, self.in_norm = times, in_norm
        self.size = torch.Tensor.norm if in_norm else _greatest
        self.theirs, self.tensors, self.upstream = theirs, tensors, upstream
        self.wanted = [] if upstream is None else [True] * len(tensors)
        self.exact, self.like = self._both([_dense(t) for t in tensors], upstream)
        self.measure = self._errors(self.exact, self.like)
        self.generator = torch.Generator().manual_seed(0)
        size = sum(t.numel() for t in tensors)
        self.left = _SIBLINGS_IN_NORM if in_norm else min(_SIBLINGS, 4 * _LARGEST // max(1, size))
        self.finite = {name: bool(e.isfinite().all()) for name, e in self.exact.items()}
        self.largest = {name: self._error(0 * e, e) for name, e in self.exact.items()}

    def _both(self, tensors, upstream):
        wide = call(self.theirs, [t.double() for t in tensors], self.wanted, _wide(upstream))
        found = wide, call(self.theirs, tensors, self.wanted, upstream)
        return [dict(each) for each in found]

    def _errors(self, exact, like):
        return {name: self._error(like[name], exact[name]) for name in exact}

    def _sibling(self):
        """Tensors and upstream, moved by some roundings of the tensors' least exact dtype."""
        step = 16 * max(torch.finfo(t.dtype).eps for t in self.tensors)
        tensors = [self._moved(t, step) for t in self.tensors]
        return tensors, self.upstream and [self._moved(u, step) for u in self.upstream]

    def _moved(self, t, step):
        shape = [1 if stride == 0 else n for n, stride in zip(t.shape, t.stride(), strict=True)]
        noise = torch.randn(shape, generator=self.generator, dtype=torch.float64)
        return (_dense(t) * (1 + step * noise)).to(t.dtype)

    def check(self, found, label):
        for name, ours in found:
            exact, like, where = self.exact[name], self.like[name], f"{label}, {name}"
            assert ours.shape == exact.shape, f"{where}: {ours.shape} for {exact.shape}"
            assert ours.dtype == like.dtype, f"{where}: {ours.dtype} for {like.dtype}"
            if not self.in_norm or name.startswith("output"):
                self.check_values([name], [(name, ours)], where)
        if self.in_norm:
            names = [name for name in self.exact if name.startswith("gradient")]
            self.check_values(names, [pair for pair in found if pair[0] in names], label)

    def check_values(self, names, results, label):
        """The results of these names, or some of them."""
        if not results:
            return
        errors, dtype = [], results[0][1].dtype
        for name, ours in results:
            exact = self.exact[name]
            if not self.finite[name]:
                assert torch.equal(ours.isnan(), exact.isnan()), f"{label}: NaN elsewhere"
            errors.append(self._error(ours, exact))
        if dtype is torch.float64:  # PyTorch's own, there is nothing more exact
            for name, ours in results:
                torch.testing.assert_close(ours, self.exact[name], equal_nan=True, msg=label)
            return
        error = math.hypot(*errors)
        assert error == error, f"{label}: NaN"
        beside = 0
        while error > (allowed := self._allowed(names, dtype)) and self.left:
            if error >= _LUCK * allowed and beside >= _FEW:
                break
            beside, self.left = beside + 1, self.left - 1
            more = self._errors(*self._both(*self._sibling()))
            self.measure = {key: max(e, more[key]) for key, e in self.measure.items()}
        if not math.isfinite(allowed):  # PyTorch's own has passed its dtype's largest number
            return
        assert error <= allowed, f"{label}: error {error:.3e}, allowed {allowed:.3e}"

    def _allowed(self, names, dtype):
        measure, largest = (
            math.hypot(*(each[name] for name in names)) for each in (self.measure, self.largest)
        )
        return self.times * (TIMES * measure + torch.finfo(dtype).eps * largest) + _OF_FLOAT64

    def _error(self, got, exact):
        """Where the exact result is finite."""
        if exact.numel() == 0:
            return 0.0
        error = self.size(got.double() - exact).item()
        if error == error:
            return error
        return self.size((got.double() - exact).where(exact.isfinite(), 0)).item()


def _dense(t):
    return t.clone(memory_format=torch.contiguous_format)


def _wide(tensors):
    return None if tensors is None else [t.double() for t in tensors]


def _greatest(t):
    return t.abs().max()


def check(
    guards,
    name,
    ours,
    theirs,
    tensors,
    layouts,
    upstream,
    mask,
    threads,
    kernels=None,
    in_norm=False,
):
    """A call on each instruction set, a large one on one of them, with one thread and with several:
    without gradients, with those of all tensors and of some. Values, bits, and memory around.

    tensors: dense, of their dtypes; ours gets them in these layouts, theirs dense. upstream: the
    outputs' gradients. kernels: whether these tensors are for our kernels, not for PyTorch's: of
    those, layouts and threads change bits. in_norm: as ``Rule`` has it.
    """
    size = sum(t.numel() for t in tensors)
    assume(size <= _LARGEST)
    given = [guards.place(t, layout) for t, layout in zip(tensors, layouts, strict=False)]
    rest = layouts[len(given) :]
    upstream = [guards.place(u, layout) for u, layout in zip(upstream, rest, strict=False)]
    fused = given[0].dtype is torch.float32 if kernels is None else kernels(*given)
    times = 1 if fused else _OF_LAYOUTS
    with thread_count(1):
        rule = Rule(theirs, given, upstream, times, in_norm)
    every = [True] * len(given)
    some = [bool(mask >> i & 1) for i in range(len(given))]
    for isa in isas_for(size, mask):
        with cpu.use_isa(isa):
            for wanted in ([], every, some):
                label = f"{name} on {isa}, gradients {wanted}"
                found = []
                for n in (1, threads):
                    with thread_count(n):
                        found.append(call(ours, given, wanted, upstream))
                    tried.count(f"calls of {name}")
                    tried.count("backward passes", int(any(wanted)))
                    guards.check(f"{label}, {n} threads")
                rule.times = times * _chains(isa)
                rule.check(found[0], label)
                if fused:
                    same_bits(*found, f"{label}, {threads} threads")


def _chains(isa):
    """How much more the rounding of a sum may be than with PyTorch's vectors of 16: its chains are
    as many times longer as the vectors are shorter, and errors grow as the root of that.
    """
    return {"baseline": 4, "neon": 4, "avx2": 2}.get(isa, 1) ** 0.5


def isas_for(size, choice):
    """Every instruction set for a case of few numbers, one of them for a larger one."""
    isas = cpu.isas()
    return isas if size <= _SMALL else [isas[choice % len(isas)]]


def same_bits(one, two, label):
    for (name, a), (_, b) in zip(one, two, strict=True):
        assert torch.equal(_bits(a), _bits(b)), f"{label}, {name}: other bits than of one thread"
        assert a.stride() == b.stride(), f"{label}, {name}: other strides"


def _bits(t):
    integers = {8: torch.int64, 4: torch.int32, 2: torch.int16}
    return t.contiguous().view(integers[t.element_size()])
