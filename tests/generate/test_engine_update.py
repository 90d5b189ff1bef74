"""Other weights in a running engine: what depends on the old ones is forgotten, and nothing is compiled."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from helpers_generation import GREEDY, ask

from glm4v_jax.errors import ConfigError, GenerationError
from glm4v_jax.generate.feature_pool import FeaturePool
from glm4v_jax.generate.slots import Slots

OPTIONS = dict(GREEDY, max_new_tokens=9, logprobs=0)


@pytest.fixture(scope="module")
def others(engine):
    """Weights that are a little larger, the ViT's included."""
    return jax.tree.map(lambda x: x * jnp.asarray(1.1, x.dtype), engine.runtime.module)


@pytest.fixture(scope="module")
def prompts(image):
    """Two of one image, whose beginnings are the same, and a text."""
    return [*(ask(image, "What is this? " * 40 + end) for end in ("Now", "Then")), "Hello"]


def answers(engine, prompts, samples=2):
    found = list(engine.generate_many(prompts, samples=samples, **OPTIONS))
    return np.stack([one.logprob_array for one in sorted(found, key=lambda one: one.index)])


def updated(make_engine, prompts, others):
    own = make_engine()
    answers(own, prompts)
    own.update(others)
    return own


@pytest.mark.slow
def test_answers_are_those_of_the_new_weights(make_engine, engine, prompts, others, lowerings):
    own = make_engine()
    before = answers(own, prompts)
    with lowerings() as lowered:
        own.update(others)
        found = answers(own, prompts)
    assert not lowered and own.updates == 1
    fresh = make_engine()
    fresh.update(others)
    assert np.array_equal(found, answers(fresh, prompts))
    assert np.abs(found - before).max() > 1e-3
    own.update(engine.runtime.module)
    assert np.array_equal(before, answers(own, prompts)) and own.stats.reused_tokens > 0


@pytest.mark.parametrize("forgetful", [FeaturePool, Slots])
def test_what_is_not_forgotten_would_show(make_engine, monkeypatch, prompts, others, forgetful):
    """The features of the old ViT, or the keys and values of the old decoder."""
    expected = answers(updated(make_engine, prompts, others), prompts)
    name = "_runtime" if forgetful is FeaturePool else "runtime"
    monkeypatch.setattr(forgetful, "use", lambda self, runtime: setattr(self, name, runtime))
    assert np.abs(answers(updated(make_engine, prompts, others), prompts) - expected).max() > 1e-3


def test_weights_are_not_replaced_under_what_is_running(make_engine, others):
    own = make_engine()
    talk = own.conversation(**GREEDY, max_new_tokens=4)
    for stream in (own.stream("Hello", **OPTIONS), own.generate_many(["Hello"] * 9, **OPTIONS), talk.ask("Hello")):
        next(stream)
        for change in (lambda: own.update(others), lambda: own.release(weights=True)):
            with pytest.raises(GenerationError, match="engine: found 1 user of its slots; expected none"):
                change()
        stream.close()
    own.update(others)
    with pytest.raises(GenerationError, match="conversation: found one that began with other weights"):
        talk.ask("And now?")
    assert own.conversation(**GREEDY, max_new_tokens=4).send("Hello").tokens


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        (lambda x: x.astype(jnp.bfloat16), r"found bfloat16 \[64\]; expected float32 \[64\]"),
        (lambda x: x[:-1], r"found float32 \[63\]; expected float32 \[64\]"),
    ],
)
def test_a_leaf_that_does_not_fit_is_named(make_engine, engine, change, fault):
    own, module = make_engine(), jax.tree.map(lambda x: x, engine.runtime.module)
    norm = module.language_model.norm
    norm.scale = nnx.Param(change(norm.scale[...]))
    with pytest.raises(ConfigError, match=rf"language_model\.norm\.scale: {fault}"):
        own.update(module)
    assert own.updates == 0


def test_another_structure_is_named(make_engine, engine):
    own = make_engine()
    with pytest.raises(ConfigError, match=r"language_model\.layers\.0\..*: found a leaf that the model does not have"):
        own.update(engine.runtime.module.unstacked())


def test_released_weights_are_free_and_may_come_back(make_engine, engine):
    own = make_engine()
    before = own.generate("Hello", **OPTIONS)
    module = jax.tree.map(jnp.copy, engine.runtime.module)
    own.update(module)
    leaf = own.runtime.text.leaves[0]
    own.release(weights=True)
    with pytest.raises(GenerationError, match="engine: found its weights released; expected an update"):
        own.generate("Hello", **OPTIONS)
    assert not any(isinstance(x, jax.Array) for x in jax.tree.leaves((own.runtime.text, own.pool._runtime.visual)))
    own.update(engine.runtime.module)
    assert own.generate("Hello", **OPTIONS) == before and leaf.shape
