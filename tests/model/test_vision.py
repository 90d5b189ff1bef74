"""Every part of the ViT against the reference's module of the same name, and packing against one image at a time."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from reference import CONFIGS, assert_close, their_modeling

from glm4v_jax.config.model import Glm4vConfig
from glm4v_jax.inputs.medium import Medium, split_media
from glm4v_jax.inputs.vision_rows import merge_order, pack
from glm4v_jax.model import rope
from glm4v_jax.model.attention.mask import Mask

pytestmark = pytest.mark.usefixtures("mesh")

GRIDS = np.array([[1, 4, 6], [1, 8, 2], [2, 2, 4]])


def vision_of(name):
    return Glm4vConfig.from_dict(CONFIGS[name]).vision_config


def pixels(name, patches, seed=0):
    return np.random.RandomState(seed).standard_normal((patches, vision_of(name).patch_dim)).astype(np.float32)


def normal(*shape, seed=0):
    return np.random.RandomState(seed).standard_normal(shape).astype(np.float32)


@pytest.mark.parametrize("name", CONFIGS)
def test_patch_embedding_equals(ours, theirs, name):
    """A convolution with stride = kernel, as a matrix product."""
    import torch

    x = pixels(name, 24)
    with torch.no_grad():
        expected = theirs(name).model.visual.patch_embed(torch.tensor(x))
    assert_close(ours(name).visual.module.patch_embed(jnp.asarray(x[None]))[0], expected, tolerance=4e-6)


@pytest.mark.parametrize("grid", [(4, 6), (2, 2), (8, 34), (46, 2), (24, 24)])
@pytest.mark.parametrize("name", CONFIGS)
def test_position_embedding_equals(ours, theirs, name, grid):
    """Tables of 5 x 5, 7 x 7, 8 x 8 and 24 x 24 with entries of O(1), at images smaller and larger than they are."""
    import torch

    h, w = grid
    vision = vision_of(name)
    coords = merge_order(h, w, vision.spatial_merge_size)
    with torch.no_grad():
        embeddings = theirs(name).model.visual.embeddings
        expected = embeddings(
            torch.zeros(h * w, vision.hidden_size), [h * w], torch.tensor([[1, h, w]]),
            torch.tensor(coords[:, 0]), torch.tensor(coords[:, 1]),
        )  # fmt: skip
    image = Medium(np.zeros((h * w, vision.patch_dim), np.float32), np.array([1, h, w]))
    rows, _ = pack([image], merge_size=vision.spatial_merge_size, position_grid=vision.position_grid)
    found = np.asarray(ours(name).visual.module._positions(rows))
    assert np.abs(expected.numpy()).max() > 1
    assert_close(found[rows.segment_ids > 0], expected)
    assert not found[rows.segment_ids == 0].any()


@pytest.mark.parametrize("name", CONFIGS)
def test_block_and_its_attention_equal(ours, theirs, name):
    import torch

    vision, visual = vision_of(name), theirs(name).model.visual
    grid = GRIDS[:2]
    n = int(grid.prod(axis=1).sum())
    x = normal(n, vision.hidden_size)
    rotary, _ = visual.rot_pos_emb(torch.tensor(grid))
    angles = torch.cat((rotary, rotary), dim=-1)
    lengths = torch.tensor([0, *np.cumsum(grid.prod(axis=1))], dtype=torch.int32)
    theirs_at = dict(cu_seqlens=lengths, position_embeddings=(angles.cos(), angles.sin()))
    segments = np.repeat(np.arange(1, 3), grid.prod(axis=1))[None].astype(np.int32)
    coords = np.concatenate([merge_order(h, w, vision.spatial_merge_size) for _, h, w in grid])[None]
    cos_sin = rope.vision_cos_sin(jnp.asarray(coords), vision.head_dim)
    mask = Mask(segments, segments)
    for i in range(vision.depth):
        block = getattr(ours(name).visual.module.blocks, str(i))
        with torch.no_grad():
            attended = visual.blocks[i].attn(torch.tensor(x), **theirs_at)
            expected = visual.blocks[i](torch.tensor(x), **theirs_at)
        assert_close(jax.jit(type(block.attn).__call__)(block.attn, x[None], cos_sin, mask)[0], attended)
        assert_close(jax.jit(type(block).__call__)(block, x[None], cos_sin, mask)[0], expected)


@pytest.mark.parametrize("name", CONFIGS)
def test_downsampling_and_merger_equal(ours, theirs, name):
    import torch

    vision, visual = vision_of(name), theirs(name).model.visual
    m = vision.spatial_merge_size
    x = normal(5 * m * m, vision.hidden_size)
    with torch.no_grad():
        blocks = torch.tensor(x).view(-1, m, m, vision.hidden_size).permute(0, 3, 1, 2)
        down = visual.downsample(blocks).view(-1, vision.out_hidden_size)
        expected = visual.merger(down)
    module = ours(name).visual.module
    found = module.downsample(jnp.asarray(x.reshape(1, 5, -1)))
    assert_close(found[0], down, tolerance=4e-6)
    assert_close(module.merger(found)[0], expected)


def test_packed_images_equal_single_ones(ours):
    """Frames share rows, in any order and any shape of rows: every one is encoded as if alone."""
    vision, model = vision_of("base"), ours("base").visual
    x = pixels("base", int(GRIDS.prod(axis=1).sum()))
    encode = jax.jit(lambda module, rows: module(rows))
    media = split_media(x, GRIDS, vision, "pixel_values", "image_grid_thw")
    frames = [
        Medium(patches, np.array([1, *medium.grid[1:]]))
        for medium in media
        for patches in np.split(medium.patches, medium.grid[0])
    ]
    alone = []
    for frame in frames:
        rows, features = pack([frame], merge_size=2, position_grid=5, shape=(1, 128))
        alone.append(np.asarray(encode(model.module, rows)).reshape(-1, 64)[features[frame]])
    for shape in ((1, 128), (2, 48), (3, 24)):
        rows, features = pack(media, merge_size=2, position_grid=vision.position_grid, shape=shape)
        index = np.concatenate([features[medium] for medium in media])
        assert_close(np.asarray(encode(model.module, rows)).reshape(-1, 64)[index], np.concatenate(alone))
    assert_close(model(x, GRIDS), np.concatenate(alone))


def test_frames_of_a_video_do_not_see_each_other(ours):
    """Trap T9: another second frame leaves the first one's tokens as they are."""
    model, grid = ours("base").visual, np.array([[2, 4, 4]])
    x = pixels("base", 32)
    changed = np.concatenate([x[:16], pixels("base", 16, seed=1)])
    one, other = np.asarray(model(x, grid)), np.asarray(model(changed, grid))
    assert np.array_equal(one[:4], other[:4]) and np.abs(one[4:] - other[4:]).max() > 0.1


def test_padding_does_not_change_tokens(ours):
    """Whatever stands in the rows' padding."""
    model = ours("base").visual
    image = Medium(pixels("base", 24), np.array([1, 4, 6]))
    rows, features = pack([image], merge_size=2, position_grid=5)
    noisy = rows._replace(patches=np.where(rows.segment_ids[..., None] > 0, rows.patches, 1e3).astype(np.float32))
    one, other = (np.asarray(model.encode(r))[features[image]] for r in (rows, noisy))
    assert np.array_equal(one, other)


def test_an_image_of_several_key_blocks_equals(ours, theirs):
    """Nine hundred patches: more than one block of keys."""
    import torch

    their_modeling()
    grid = np.array([[1, 30, 30]])
    x = pixels("wide", 900)
    with torch.no_grad():
        expected = theirs("wide").model.visual(torch.tensor(x), torch.tensor(grid))
    assert_close(ours("wide").visual(x, grid), expected)
