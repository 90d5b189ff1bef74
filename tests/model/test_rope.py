"""Rotary embeddings against the reference's modules, below and above the limits of every rope type."""

import copy
import itertools
import json

import jax.numpy as jnp
import numpy as np
import pytest
from reference import CONFIGS, assert_close, load_theirs, their_modeling, write_checkpoint

from glm4v_jax import Glm4vForConditionalGeneration
from glm4v_jax.config.model import Glm4vConfig, Glm4vTextConfig
from glm4v_jax.model import rope

FACTORS = [1.0, 1.1, 1.3, 2.0]
LONG_FACTORS = [2.0, 2.2, 2.6, 4.0]
LIMIT = 64

# Head of 16, half of it rotated: four frequencies.
TYPES = {
    "default": {"rope_type": "default"},
    "old spelling": {"type": "default"},
    "linear": {"rope_type": "linear", "factor": 3.0},
    "dynamic": {"rope_type": "dynamic", "factor": 2.5},
    "yarn": {"rope_type": "yarn", "factor": 4.0},
    "yarn of its own length": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16},
    "yarn, all options": {
        "rope_type": "yarn", "factor": 8.0, "beta_fast": 16.0, "beta_slow": 2.0, "mscale": 0.7, "mscale_all_dim": 0.9,
        "truncate": False,
    },
    "yarn with its factor": {"rope_type": "yarn", "factor": 8.0, "attention_factor": 0.8},
    "longrope": {"rope_type": "longrope", "short_factor": FACTORS, "long_factor": LONG_FACTORS, "factor": 4.0},
    "longrope with its factor": {
        "rope_type": "longrope", "short_factor": FACTORS, "long_factor": LONG_FACTORS, "attention_factor": 1.2,
    },
    "llama3": {
        "rope_type": "llama3", "factor": 8.0, "original_max_position_embeddings": 64, "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
    },
    "llama3, long": {
        "rope_type": "llama3", "factor": 2.0, "original_max_position_embeddings": 32000, "low_freq_factor": 2.0,
        "high_freq_factor": 32.0,
    },
}  # fmt: skip


def text_config(scaling, **options):
    base = dict(
        hidden_size=32, num_attention_heads=2, num_key_value_heads=1, partial_rotary_factor=0.5, rope_theta=1000.0,
        max_position_embeddings=LIMIT, rope_scaling=dict(scaling) | {"mrope_section": [1, 1, 2]}, vocab_size=10,
    )  # fmt: skip
    return base | options


def their_cos_sin(arguments, *calls):
    """cos and sin [3, B, T, rotary] of the last call; earlier ones leave their traces, as they do there."""
    modeling, torch = their_modeling(), pytest.importorskip("torch")
    # partial_rotary_factor is no argument of the reference's configuration, but kept like any unknown one.
    module = modeling.Glm4vTextRotaryEmbedding(modeling.Glm4vTextConfig(**arguments))
    for positions in calls:
        cos, sin = module(torch.zeros(1), torch.tensor(positions))
    return cos.numpy(), sin.numpy()


def select(x, section):
    """The frequencies of [3, B, T, 2F] that follow each axis: what `apply_multimodal_rotary_pos_emb` takes of them."""
    edges = np.cumsum([0, *section])
    return np.concatenate([x[i, :, :, a:b] for i, (a, b) in enumerate(itertools.pairwise(edges))], axis=-1)


@pytest.mark.parametrize("longest", [20, LIMIT - 1, LIMIT, 700])
@pytest.mark.parametrize("name", TYPES)
def test_text_rope_equals(name, longest):
    arguments = text_config(TYPES[name])
    positions = np.random.RandomState(longest).randint(0, longest + 1, (3, 2, 12))
    positions[0, 0, 0] = longest
    expected = their_cos_sin(arguments, positions)
    found = rope.mrope_cos_sin(jnp.asarray(positions), Glm4vTextConfig.from_dict(arguments))
    # An angle of 700 radians has a float32 spacing of 6e-5, and the two multiply in different orders of rounding.
    tolerance = 2e-6 + 1.2e-7 * longest
    for one, other in zip(found, expected, strict=True):
        assert_close(one, select(other, [1, 1, 2]), tolerance=tolerance)


@pytest.mark.parametrize("name", TYPES)
def test_rope_types_differ_from_the_default(name):
    """Or the comparison above could not tell a type from none; the old spelling is the default."""
    positions = jnp.asarray(np.random.RandomState(0).randint(0, 700, (3, 2, 12)))
    plain, _ = rope.mrope_cos_sin(positions, Glm4vTextConfig.from_dict(text_config(TYPES["default"])))
    found, _ = rope.mrope_cos_sin(positions, Glm4vTextConfig.from_dict(text_config(TYPES[name])))
    assert (np.abs(found - plain).max() > 1e-3) == (name not in ("default", "old spelling"))


def test_longrope_with_an_original_length_equals():
    """`original_max_position_embeddings` of the configuration decides the factor and where the long factors begin."""
    arguments = text_config(TYPES["longrope"], original_max_position_embeddings=16, max_position_embeddings=64)
    for longest in (15, 16, 40):
        positions = np.full((3, 1, 4), longest) - np.arange(4)
        expected = their_cos_sin(arguments, positions)
        found = rope.mrope_cos_sin(jnp.asarray(positions), Glm4vTextConfig.from_dict(arguments))
        for one, other in zip(found, expected, strict=True):
            assert_close(one, select(other, [1, 1, 2]))


def test_dynamic_rope_forgets_longer_calls():
    """A function of its arguments; the reference's agrees once a short call has reset what a long one left behind."""
    arguments = text_config(TYPES["dynamic"])
    long, short = np.full((3, 1, 4), 300), np.arange(12).reshape(1, 1, 12).repeat(3, axis=0)
    expected = their_cos_sin(arguments, long, short)
    found = rope.mrope_cos_sin(jnp.asarray(short), Glm4vTextConfig.from_dict(arguments))
    for one, other in zip(found, expected, strict=True):
        assert_close(one, select(other, [1, 1, 2]), tolerance=2e-6)


@pytest.mark.slow
@pytest.mark.usefixtures("mesh")
@pytest.mark.parametrize("name", ["dynamic", "longrope"])
def test_steps_across_the_limit_equal(tmp_path, name):
    """A prompt below the limit, and tokens one by one beyond it: what the cache holds is not rotated again."""
    torch = pytest.importorskip("torch")
    their_modeling()
    config = copy.deepcopy(CONFIGS["base"])
    config["text_config"] |= {"max_position_embeddings": 16, "rope_scaling": TYPES[name] | {"mrope_section": [1, 1, 2]}}
    write_checkpoint("base", tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(config), encoding="utf-8")
    model, reference = Glm4vForConditionalGeneration.from_pretrained(tmp_path, stacked=True), load_theirs(tmp_path)
    ids = np.random.RandomState(4).randint(0, 300, (1, 18))
    past = theirs = None
    for start, end in ((0, 14), (14, 15), (15, 16), (16, 17), (17, 18)):
        found = model(ids[:, start:end], past_key_values=past)
        with torch.no_grad():
            expected = reference(
                torch.tensor(ids[:, start:end]), past_key_values=theirs, use_cache=True,
                attention_mask=torch.ones((1, end), dtype=torch.int64), cache_position=torch.arange(start, end),
            )  # fmt: skip
        assert_close(found.logits, expected.logits)
        past, theirs = found.past_key_values, expected.past_key_values
    # The limit was felt: all at once every key is rotated beyond it.
    whole = np.asarray(model(ids, logits_to_keep=1).logits)
    assert np.abs(whole - found.logits).max() > 1e-3 * np.abs(whole).max()


@pytest.mark.parametrize("section", [[1, 1, 2], [2, 1, 1], [0, 2, 2], [4, 0, 0]])
@pytest.mark.parametrize("partial", [0.5, 1.0])
def test_interleaved_rotation_equals(section, partial):
    modeling, torch = their_modeling(), pytest.importorskip("torch")
    section = [int(n * partial * 2) for n in section]
    arguments = text_config({"rope_type": "default", "mrope_section": section}, partial_rotary_factor=partial)
    arguments["rope_scaling"]["mrope_section"] = section
    random = np.random.RandomState(1)
    positions = random.randint(0, 90, (3, 2, 7))
    q, k = (random.standard_normal((2, 7, heads, 16)).astype(np.float32) for heads in (3, 1))
    cos, sin = (torch.tensor(x) for x in their_cos_sin(arguments, positions))
    expected = modeling.apply_multimodal_rotary_pos_emb(
        *(torch.tensor(x).transpose(1, 2) for x in (q, k)), cos, sin, section
    )
    cos_sin = rope.mrope_cos_sin(jnp.asarray(positions), Glm4vTextConfig.from_dict(arguments))
    for x, other in zip((q, k), expected, strict=True):
        found = rope.apply_interleaved(jnp.asarray(x), *cos_sin)
        assert_close(found, other.transpose(1, 2))
        if partial < 1:
            assert np.array_equal(np.asarray(found)[..., 8:], x[..., 8:])


def test_rotation_is_the_same_for_grouped_heads():
    """Heads may have one axis or two, [K, G]; the rotation is the same."""
    config = Glm4vConfig.from_dict(CONFIGS["base"]).text_config
    x = np.random.RandomState(2).standard_normal((2, 7, 2, 2, 16)).astype(np.float32)
    cos_sin = rope.mrope_cos_sin(jnp.asarray(np.arange(42).reshape(3, 2, 7)), config)
    flat = rope.apply_interleaved(jnp.asarray(x.reshape(2, 7, 4, 16)), *cos_sin)
    assert np.array_equal(rope.apply_interleaved(jnp.asarray(x), *cos_sin), flat.reshape(x.shape))


@pytest.mark.parametrize("head_dim", [4, 8, 128])
@pytest.mark.parametrize("grid", [(2, 6), (12, 4)])
def test_vision_rope_equals(head_dim, grid):
    modeling, torch = their_modeling(), pytest.importorskip("torch")
    h, w = grid
    coords = np.stack(np.meshgrid(np.arange(h), np.arange(w), indexing="ij"), axis=-1).reshape(1, -1, 2)
    freqs = modeling.Glm4vVisionRotaryEmbedding(head_dim // 2)(max(grid))[torch.tensor(coords[0])].flatten(1)
    angles = torch.cat((freqs, freqs), dim=-1)
    random = np.random.RandomState(3)
    q, k = (random.standard_normal((h * w, 2, head_dim)).astype(np.float32) for _ in range(2))
    expected = modeling.apply_rotary_pos_emb_vision(torch.tensor(q), torch.tensor(k), angles.cos(), angles.sin())
    cos, sin = rope.vision_cos_sin(jnp.asarray(coords), head_dim)
    assert_close(cos[0], freqs.cos(), tolerance=2e-6)
    for x, other in zip((q, k), expected, strict=True):
        assert_close(rope.apply_half(jnp.asarray(x[None]), cos, sin)[0], other, tolerance=4e-6)


def test_angles_are_float32_in_low_precision():
    x = jnp.ones((1, 1, 1, 4), jnp.bfloat16)
    cos, sin = rope.vision_cos_sin(jnp.full((1, 1, 2), 1000), 4)
    assert cos.dtype == sin.dtype == jnp.float32
    assert rope.apply_half(x, cos, sin).dtype == jnp.bfloat16
