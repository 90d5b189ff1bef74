"""Each kind of checkpoint against transformers 5.24; see `tests/golden/make_family_goldens.py`."""

import numpy as np
import pytest
from helpers_family import GOLDEN, KINDS, digest


@pytest.fixture(scope="session")
def golden():
    """kind -> {case/what: array}."""
    return {kind: dict(np.load(GOLDEN / f"{kind}.npz")) for kind in KINDS}


@pytest.mark.parametrize("kind", KINDS)
def test_the_goldens_are_of_this_checkpoint(kind, golden, family_checkpoint):
    """Where this fails: `make family-goldens`."""
    assert golden[kind]["checkpoint"] == digest(family_checkpoint(kind))
