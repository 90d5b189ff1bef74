"""The tiny checkpoints of the family, each written once."""

import pytest
from helpers_family import checkpoint


@pytest.fixture(scope="session")
def family_checkpoint(tmp_path_factory):
    """kind -> directory of its checkpoint, in the file layout of its release; see `helpers_family.KINDS`."""
    directory = tmp_path_factory.mktemp("family")
    return lambda kind: checkpoint(kind, directory)
