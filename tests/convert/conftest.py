"""Checkpoints that the tests of the converter share; none of them may be written to."""

import pytest


@pytest.fixture(scope="session")
def synthetic(tmp_path_factory):
    """(dtype, number of shards) -> directory of a random checkpoint of the tiny model."""
    from convert.synth import load_config, synth

    made = {}

    def get(dtype="bfloat16", count=2):
        if (dtype, count) not in made:
            made[dtype, count] = tmp_path_factory.mktemp("synthetic") / f"{dtype}-{count}"
            synth(load_config("tiny"), made[dtype, count], dtype=dtype, count=count)
        return made[dtype, count]

    return get
