"""The decoder's parts against the reference's."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from reference import CONFIGS, assert_close

from glm4v_jax.config.model import Glm4vConfig
from glm4v_jax.model import rope
from glm4v_jax.model.attention.attend import Mask, attend_with_weights
from glm4v_jax.model.decoder import NOTHING, Capture
from glm4v_jax.model.kv_cache import init_cache
from glm4v_jax.model.layer_attention import attention_to_tokens

pytestmark = pytest.mark.usefixtures("mesh")

B, T = 2, 13


def text_of(name):
    return Glm4vConfig.from_dict(CONFIGS[name]).text_config


def example(name, seed=0):
    """Residual stream, M-RoPE positions as images have them, and a row that starts with padding."""
    random = np.random.RandomState(seed)
    x = random.standard_normal((B, T, text_of(name).hidden_size)).astype(np.float32)
    positions = np.sort(random.randint(0, 60, (3, B, T)), axis=-1)
    segments = np.ones((B, T), np.int32)
    segments[1, :4] = 0
    return x, positions, segments


def their_mask(torch, segments):
    visible = np.tril(np.ones((T, T), bool))[None] & (segments[:, None, :] > 0)
    return torch.where(torch.tensor(visible), 0.0, torch.finfo(torch.float32).min)[:, None]


@pytest.mark.parametrize("name", CONFIGS)
def test_attention_and_layer_equal(ours, theirs, name):
    import torch

    x, positions, segments = example(name)
    text = theirs(name).model.language_model
    with torch.no_grad():
        embeddings = text.rotary_emb(torch.tensor(x), torch.tensor(positions))
        at = dict(position_embeddings=embeddings, attention_mask=their_mask(torch, segments))
        attended, weights = text.layers[0].self_attn(torch.tensor(x), **at)
        expected = text.layers[0](torch.tensor(x), **at)
    layer = getattr(ours(name).language_model.module.layers, "0")

    @jax.jit
    def run(layer, x):
        cos_sin = rope.mrope_cos_sin(jnp.asarray(positions), text_of(name))
        q, k, v = layer.self_attn.project(x, cos_sin)
        out, weights = attend_with_weights(q, k, v, Mask(segments, segments, np.zeros(B, np.int32)), causal=True)
        attention = attention_to_tokens(jnp.asarray(segments))
        return layer.self_attn.o_proj(out), weights, layer(x, cos_sin, attention)

    out, found_weights, (found, kept) = run(layer, x)
    real = segments > 0
    assert_close(out, attended, real)
    found_weights = np.asarray(found_weights).reshape(B, -1, T, T)
    assert_close(found_weights.swapaxes(1, 2), weights.transpose(1, 2), real)
    assert kept == (None, None)
    assert_close(found, expected, real)


@pytest.mark.parametrize("stacked", [True, False])
def test_decoder_and_its_intermediates_equal(ours, theirs, stacked):
    import torch

    x, positions, segments = example("base", seed=1)
    reference = theirs("base").model.language_model
    with torch.no_grad():
        expected = reference(
            inputs_embeds=torch.tensor(x), position_ids=torch.tensor(positions), attention_mask=torch.tensor(segments),
            output_hidden_states=True, output_attentions=True,
        )  # fmt: skip
    module = ours("base").module
    text = (module.stacked() if stacked else module).language_model
    run = jax.jit(lambda text, record: text(x, positions, segments, record=record), static_argnums=1)
    hidden, cache, recorded = run(text, Capture(hidden_states=True, attentions=True))
    real = segments > 0
    assert cache is None
    assert_close(hidden, expected.last_hidden_state, real)
    for one, other in zip(recorded.hidden_states, expected.hidden_states[:-1], strict=True):
        assert_close(one, other, real)
    for one, other in zip(recorded.attentions, expected.attentions, strict=True):
        assert_close(np.asarray(one).reshape(B, 4, T, T).swapaxes(1, 2), other.transpose(1, 2), real)
    again, _, nothing = run(text, Capture())
    assert_close(again, hidden, real)
    assert nothing == (None, None)


@pytest.mark.parametrize("stacked", [True, False])
def test_sequences_in_one_row_with_another_attention_equal_rows_of_their_own(ours, stacked):
    """As an inference engine runs the layers: tokens one behind the other, and its attention keeps them apart."""
    x, positions, segments = example("base", seed=6)
    module = ours("base").module
    text = (module.stacked() if stacked else module).language_model
    real = segments > 0
    sequence = np.nonzero(real)[0]
    seen = np.tri(len(sequence), dtype=bool) & (sequence[:, None] == sequence)

    def attention_of_layer(index):
        def attention(q, k, v):
            scores = jnp.einsum("tkgh,skh->kgts", q[0], k[0]) / np.sqrt(q.shape[-1])
            weights = jax.nn.softmax(jnp.where(seen, scores, -jnp.inf))
            return jnp.einsum("kgts,skh->tkgh", weights, v[0])[None], (index, k[0])

        return attention

    def flat(text):
        cos_sin = rope.mrope_cos_sin(positions[:, real][:, None], text_of("base"))
        return text.run(jnp.asarray(x[real][None]), cos_sin, attention_of_layer)

    hidden, kept = jax.jit(flat)(text)
    expected, cache, _ = jax.jit(
        lambda text: text(x, positions, segments, init_cache(text_of("base"), B, T, jnp.float32, stacked=stacked))
    )(text)
    np.testing.assert_allclose(hidden[0], np.asarray(expected)[real], rtol=0, atol=1e-5)
    layers = range(text.layers.num_layers)
    assert isinstance(kept, list) != stacked  # arrays of single layers are never copied to one
    for layer, (index, k) in zip(layers, zip(*kept, strict=True) if stacked else kept, strict=True):
        assert index == layer
        cached = np.moveaxis(np.asarray(cache.k[layer]), 1, 2)
        np.testing.assert_allclose(k, cached[real], rtol=0, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("stacked", [True, False])
def test_decoding_in_chunks_equals_all_at_once(ours, stacked):
    """In chunks of 1, 4 and 8 tokens, rows at different slots: the same as all at once."""
    x, positions, _ = example("base", seed=2)
    module = ours("base").module
    text = (module.stacked() if stacked else module).language_model
    segments = np.ones((B, T), np.int32)
    whole, _, _ = jax.jit(lambda text: text(x, positions, segments))(text)
    cache = init_cache(text_of("base"), B, 24, jnp.float32, stacked=stacked)
    run = jax.jit(lambda text, x, p, s, cache: text(x, p, s, cache)[:2])
    parts, start = [], 0
    for n in (1, 4, 8):
        here = slice(start, start + n)
        out, cache = run(text, x[:, here], positions[:, :, here], segments[:, here], cache)
        parts.append(out)
        start += n
    assert_close(np.concatenate(parts, axis=1), whole)
    assert cache.length.tolist() == [T, T]
    assert np.array_equal(cache.segments, np.arange(24) < np.full((B, 1), T))


@pytest.mark.slow
def test_chunks_do_not_show_in_an_int8_cache(ours):
    """Tokens of one chunk see each other's rounded keys, as later ones do; where weights are returned as well."""
    x, positions, _ = example("base", seed=5)
    text = ours("base").module.stacked().language_model
    step = jax.jit(
        lambda text, x, p, cache, record: text(x, p, jnp.ones(x.shape[:2], jnp.int32), cache, record=record)[:2],
        static_argnums=4,
    )

    def run(sizes, dtype, record=NOTHING):
        cache, parts = init_cache(text_of("base"), B, 24, dtype), []
        for start, n in zip(np.cumsum([0, *sizes]), sizes, strict=False):
            here = slice(start, start + n)
            out, cache = step(text, x[:, here], positions[:, :, here], cache, record)
            parts.append(np.asarray(out))
        return np.concatenate(parts, axis=1)

    def size(x):
        return np.sqrt(np.mean(np.square(x)))

    whole = run([T], "int8")
    rounding = size(whole - run([T], "float32"))
    assert 1e-4 < rounding / size(whole) < 1e-2
    # Numbers halfway between two integers may be rounded to either.
    assert size(run([1, 4, 8], "int8") - whole) <= 0.2 * rounding
    assert size(run([T], "int8", Capture(attentions=True)) - whole) <= 0.2 * rounding


def test_every_layer_has_its_own_dropout(ours):
    """Two equal layers drop different probabilities."""
    text = ours("base").module.stacked().language_model
    text.layers = jax.tree.map(lambda leaf: jnp.stack([leaf[0], leaf[0]]), text.layers)
    text.layers.stacked.self_attn.dropout_rate = 0.5
    x, positions, segments = example("base", seed=3)
    run = jax.jit(
        lambda text, key: text(x, positions, segments, record=Capture(attentions=True), dropout_key=key)[2].attentions
    )
    dropped = np.asarray(run(text, jax.random.key(1)))[:, 0, :, :, -1] == 0
    assert dropped.any(axis=(1, 2, 3)).all() and (dropped[0] != dropped[1]).any()


def test_dropout_applies_to_a_few_tokens_after_a_cache(ours):
    text = ours("base").module.language_model
    for index in range(text.layers.num_layers):
        getattr(text.layers, str(index)).self_attn.dropout_rate = 0.5
    x, positions, segments = example("base", seed=4)
    cache = init_cache(text_of("base"), B, 24, jnp.float32, stacked=False)
    few = slice(0, 4)
    run = jax.jit(lambda text, key: text(x[:, few], positions[:, :, few], segments[:, few], cache, dropout_key=key)[0])
    one, other = (run(text, jax.random.key(seed)) for seed in (1, 2))
    assert np.abs(one - other)[0].max() > 1e-3


def test_layers_one_by_one_share_the_trace_of_attention_to_a_cache(ours):
    text = ours("base").module.language_model
    x, positions, segments = example("base")
    cache = init_cache(text_of("base"), B, 24, jnp.float32, stacked=False)
    lowered = jax.jit(lambda text, cache: text(x, positions, segments, cache)[0]).lower(text, cache).as_text()
    assert lowered.count(" @attend_cached(") == 1 + text.layers.num_layers > 2  # a definition, and the calls
