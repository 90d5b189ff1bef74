"""The model in vLLM's engine, against the functional model: the engine is `helpers_vllm.Runner`, with no vLLM."""

import sys

import numpy as np
import pytest
from helpers_mesh import run_on_devices
from helpers_vllm import Runner, Sequence, feature
from reference import Prompts

from glm4v_jax.config.model import Glm4vConfig

ROWS = [[12], [4, ("image", (4, 6)), 3, ("image", (8, 4)), 2], [3, ("video", (2, 4, 4)), 2], [35]]
TEXT, IMAGES, VIDEO, LONG = range(4)


def prompts_of(config):
    return Prompts(config, ROWS, padding="right", seed=5)


def sequences(prompts):
    """A `Sequence` for each row; vLLM's place of a video begins with its first marker and ends with the last."""
    config, images, videos, found = prompts.config, [0, 0], [0, 0], []
    for row, mask in zip(prompts.input_ids, prompts.real, strict=True):
        tokens, features = row[mask].tolist(), []
        begin = 0
        while begin < len(tokens):
            token, kind, end = tokens[begin], None, begin + 1
            if token == config.video_start_token_id:
                kind, counts, grids, pixels = "video", videos, prompts.video_grid_thw, prompts.pixel_values_videos
                end = tokens.index(config.video_end_token_id, begin) + 1
            elif token == config.image_token_id:
                kind, counts, grids, pixels = "image", images, prompts.image_grid_thw, prompts.pixel_values
                end = tokens.index(config.image_end_token_id, begin)
            if kind:
                grid = grids[counts[0]]
                own = pixels[counts[1] : counts[1] + grid.prod()]
                features.append(feature(kind, grid, begin, tokens[begin:end], own, config.image_token_id))
                counts[0], counts[1] = counts[0] + 1, counts[1] + grid.prod()
            begin = end
        found.append(Sequence(tokens, tuple(features)))
    return found


def logits_of(directory, devices):
    """Name of a case -> logits [tokens, V] that the adapter gives, of row `int(name[-1])`."""
    runner = Runner(directory, devices)
    text, images, video, long = sequences(prompts_of(Glm4vConfig.from_pretrained(directory)))
    found = {}
    (found[f"one prefill {IMAGES}"],) = runner.run([(images, len(images.tokens))], 32)
    parts = [runner.run([(long, count)], 16)[0] for count in (16, 13, 1, 1, 4)]
    found[f"chunks and single tokens over pages {LONG}"] = np.concatenate(parts)
    (first,) = runner.run([(text, 11)], 16)
    second, found[f"beside another sequence {VIDEO}"] = runner.run([(text, 1), (video, len(video.tokens))], 32)
    found[f"a token beside a prompt {TEXT}"] = np.concatenate([first, second])
    return found


@pytest.fixture(scope="module")
def expected(ours, checkpoints):
    model = ours("base")
    prompts = prompts_of(model.config)
    logits = np.asarray(model(**prompts.inputs).logits)
    return [row[mask] for row, mask in zip(logits, prompts.real, strict=True)]


def assert_equal_logits(found, expected):
    for name, logits in found.items():
        np.testing.assert_allclose(logits, expected[int(name[-1])], rtol=0, atol=1e-4, err_msg=name)


def test_logits_on_one_device_are_those_of_the_model(checkpoints, expected):
    assert_equal_logits(logits_of(checkpoints("base"), 1), expected)


def test_logits_on_two_devices_are_those_of_the_model(checkpoints, expected, tmp_path):
    run_on_devices(__file__, str(checkpoints("base")), str(tmp_path / "found.npz"), count=2)
    with np.load(tmp_path / "found.npz") as found:
        assert_equal_logits(dict(found), expected)


if __name__ == "__main__":
    np.savez(sys.argv[2], **logits_of(sys.argv[1], 2))
