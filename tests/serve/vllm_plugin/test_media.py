"""vLLM's tensors of images and videos, and the shapes that its processor can make of them."""

from types import SimpleNamespace

import numpy as np
import pytest
from helpers_vllm import vllm_config

from glm4v_jax.config.model import Glm4vConfig
from glm4v_jax.serve.vllm_plugin.media import media_in, shapes_of
from glm4v_jax.tiny import TINY_CHECKPOINT

GRIDS = [[1, 2, 4], [1, 4, 4]]


def test_tensors_of_torch_and_lists_of_them_are_taken():
    torch = pytest.importorskip("torch", reason="torch is not installed")
    config = Glm4vConfig.tiny()
    pixels = np.random.default_rng(0).standard_normal((24, config.vision_config.patch_dim), np.float32)
    tensor, grids = torch.tensor(pixels, dtype=torch.bfloat16), torch.tensor(GRIDS)
    for kind in ("pixel_values", "image_grid_thw"), ("pixel_values_videos", "video_grid_thw"):
        for values, sizes in (tensor, grids), ([tensor[:8], tensor[8:]], [grids[0], grids[1]]):
            found = media_in(dict(zip(kind, (values, sizes), strict=True)), config)
            assert [medium.grid.tolist() for medium in found] == GRIDS
            assert np.array_equal(np.concatenate([medium.patches for medium in found]), tensor.float().numpy())


def test_shapes_are_those_that_the_processor_and_the_scheduler_allow():
    config = Glm4vConfig.from_pretrained(TINY_CHECKPOINT).vision_config

    def shapes(**options):
        return shapes_of(TINY_CHECKPOINT, config, vllm_config(TINY_CHECKPOINT, **options))

    # 64 tokens are 256 patches; the processor's smallest image has 8.
    images = [(1, length) for length in (32, 48, 64, 96, 128, 192, 256)]
    assert shapes(limit_per_prompt={"video": SimpleNamespace(count=0)}) == images
    assert shapes() == images  # videos of that size are in one row as well
    assert any(rows > 1 for rows, _ in shapes(max_num_batched_tokens=4096))
    size = {"size": {"longest_edge": 96 * 14**2 * 2}}
    assert max(rows * length for rows, length in shapes(mm_processor_kwargs=size)) == 128
