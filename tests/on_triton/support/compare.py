"""The rule for errors, over all results of an operation."""

from helpers import assert_as_exact, assert_small_rms, forward_backward


def check(ours, f, inputs, upstream):
    """Ours, f's outputs and then its inputs' gradients, against f in float64, with f in the inputs'
    own dtype as the measure. Those that are None are not looked at.
    """
    exact = forward_backward(f, [t.double() for t in inputs], [u.double() for u in upstream])
    theirs = forward_backward(f, inputs, upstream)
    for i, (o, t, e) in enumerate(zip(ours, theirs, exact, strict=True)):
        if o is not None:
            assert_as_exact(o, t, e, f"result {i}")
            if e.numel() > 0 and e.norm() > 0:
                assert_small_rms(o, t, e, f"result {i}")
