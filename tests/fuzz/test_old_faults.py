"""Random surgery finds faults that are put back; the page on reliability has the list of them."""

import pytest

from .old_faults import FAULTS, search


@pytest.mark.parametrize(
    "name",
    [
        "padding idx of an embedding",
        "a hook before the backward pass",
        "a forward set on an instance",
    ],
)
def test_a_fault_that_is_put_back_is_found(name, monkeypatch):
    FAULTS[name](monkeypatch)
    _, failure = search(rounds=60, plans=["outputs_and_gradients"])
    assert isinstance(failure, AssertionError)
