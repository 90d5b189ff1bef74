"""Sessions on the random model."""

import pytest
from helpers_checkpoints import RANDOM_CHECKPOINT

from glm4v_jax.cli.chat.session import Session


@pytest.fixture(scope="module")
def engine(stacked_layers):
    from glm4v_jax.generate.engine import Engine

    return Engine.from_pretrained(RANDOM_CHECKPOINT)


@pytest.fixture
def new_session(engine):
    """Makes a session that answers with at most 8 tokens, greedily unless a preset or options say otherwise."""

    def make(preset=None, model="tiny", default=8, **options):
        arguments = {name: options.pop(name) for name in ("writer",) if name in options}
        given = options if preset or options else {"do_sample": False}
        return Session(engine, model, None, preset, given, default, **arguments)

    return make


@pytest.fixture
def session(new_session):
    return new_session()
