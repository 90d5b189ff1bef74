"""What a training step draws: dropout of adapters and noise of embeddings, the same for the same step alone."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers_lora import batch_of, logits_of, trained
from reference import CONFIGS

from glm4v_jax.config.model import Glm4vConfig
from glm4v_jax.model import lora, nn
from train.noise import Noise, add_noise

pytestmark = pytest.mark.usefixtures("mesh")

CONFIG = Glm4vConfig.from_dict(CONFIGS["base"])


def test_a_share_of_the_inputs_drops_out_and_the_others_are_scaled():
    x = jnp.ones((2, 50, 40))
    found = np.asarray(nn.dropped(x, jax.random.key(0), 0.25))
    assert set(np.unique(found)) == {np.float32(0), np.float32(1 / 0.75)}
    assert np.mean(found == 0) == pytest.approx(0.25, abs=0.03)


@pytest.mark.slow
@pytest.mark.parametrize("stacked", [True, False])
def test_only_what_adapters_see_drops_out(ours, stacked):
    base = ours("base").module
    base = base.stacked() if stacked else base
    batch, _ = batch_of(CONFIG, [[9]])
    key = jax.random.key(1)
    adapter = trained(base, lora.LoraConfig(rank=2))
    expected = logits_of(adapter, batch)
    found = [logits_of(lora.with_dropout(adapter, key, rate), batch) for rate in (0.0, 0.5, 0.5)]
    assert np.array_equal(found[0], expected) and np.array_equal(found[1], found[2])
    assert not np.array_equal(found[1], expected)
    assert np.array_equal(logits_of(lora.with_dropout(base, key, 0.5), batch), logits_of(base, batch))
    keys = [
        linear.lora_key[...]
        for found in lora.linears(lora.with_dropout(adapter, key, 0.5)).values()
        for linear in found
        if linear.lora_a is not None
    ]
    keys = np.concatenate([np.asarray(jax.random.key_data(one)).reshape(-1, 2) for one in keys])
    assert len(np.unique(keys, axis=0)) == len(keys)  # every layer has its own


def test_noise_of_embeddings_goes_by_the_length_of_a_sample():
    """Of the text of two samples in a row, not of an image nor of padding."""
    batch, _ = batch_of(CONFIG, [[11, ("image", (4, 6)), 3], [40]])
    segments = np.array(batch.segment_ids)
    segments[1, 10:30], segments[1, 30:] = 2, 0
    batch = batch._replace(segment_ids=jnp.asarray(segments))
    key, size = jax.random.key(2), 4096
    found = np.asarray(add_noise(jnp.zeros((*segments.shape, size)), batch, key, alpha=5.0))
    is_text = (segments > 0) & (np.asarray(batch.vision_index) < 0)
    assert not found[~is_text].any()
    for row, number in ((0, 1), (1, 1), (1, 2)):
        of_sample = segments[row] == number
        largest = 5 / np.sqrt(of_sample.sum() * size)
        drawn = found[row][of_sample & is_text[row]]
        assert np.abs(drawn).max() <= largest and drawn.std() == pytest.approx(largest / np.sqrt(3), rel=0.02)


def test_the_step_decides_what_is_drawn():
    keys = [
        jax.random.key_data(Noise(seed).keys(jnp.int32(step), 3)) for seed, step in ((0, 1), (0, 1), (0, 2), (1, 1))
    ]
    assert np.array_equal(keys[0], keys[1])
    assert len({key.tobytes() for keys in keys[1:] for key in np.asarray(keys)}) == 9
