"""A model that samples and learns, once a module; its programs are compiled once, for micro-batches of one shape."""

import pytest


@pytest.fixture(scope="package")
def learner(mesh):
    """See `helpers_rl.Learner`."""
    from helpers_rl import Learner

    return Learner(mesh)
