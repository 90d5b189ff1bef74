"""The model in vLLM's engine, against the functional model: the engine is `helpers_vllm.Runner`, with no vLLM."""

import jax
import numpy as np
import pytest
from helpers_family import checkpoint
from helpers_lora import trained
from helpers_vllm import Runner, Sequence, feature, vllm_config
from reference import CONFIGS, Prompts

from glm4v_jax import Glm4vForConditionalGeneration
from glm4v_jax.checkpoints.adapter import save_adapter
from glm4v_jax.config.model import Glm4vConfig
from glm4v_jax.errors import ConfigError
from glm4v_jax.inputs.mrope import rope_index
from glm4v_jax.model.lora import merge_lora
from glm4v_jax.serve.vllm_plugin import model as model_file
from glm4v_jax.serve.vllm_plugin.model import Glm4vForVllm
from glm4v_jax.serve.vllm_plugin.settings import VllmSettings

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


def logits_of(runner):
    """Name of a case -> logits [tokens, V] of the model in the engine, of row `int(name[-1])`."""
    text, images, video, long = sequences(prompts_of(runner.model.engine.config))
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


@pytest.fixture(scope="module")
def runner(checkpoints):
    return Runner(checkpoints("base"), 1)


@pytest.mark.slow
def test_logits_on_one_device_are_those_of_the_model(runner, expected):
    assert_equal_logits(logits_of(runner), expected)


@pytest.fixture(scope="module")
def two_devices(checkpoints, run_on_devices):
    """What `on_two_devices` finds."""
    return run_on_devices(on_two_devices, checkpoints("base"))


def test_logits_on_two_devices_are_those_of_the_model(two_devices, expected):
    assert_equal_logits(two_devices["logits"], expected)


def test_two_devices_exchange_two_sums_in_a_layer_and_one_of_the_embedding(two_devices):
    layers = Glm4vConfig.from_dict(CONFIGS["base"]).text_config.num_hidden_layers
    assert two_devices["collectives"] == ["all-reduce"] * (2 * layers + 1)


def features_of(runner):
    """Features of the prompts' images and video, one after the other."""
    prompts = prompts_of(runner.model.engine.config)
    calls = (
        dict(pixel_values=prompts.pixel_values, image_grid_thw=prompts.image_grid_thw),
        dict(pixel_values_videos=prompts.pixel_values_videos, video_grid_thw=prompts.video_grid_thw),
    )
    with jax.set_mesh(runner.mesh):
        return np.concatenate([features for call in calls for features in runner.model.embed_multimodal(**call)])


def test_features_on_two_devices_are_those_on_one(two_devices, runner):
    expected = features_of(runner)
    np.testing.assert_allclose(two_devices["features"], expected, rtol=0, atol=1e-5 * np.abs(expected).max())


def test_the_vit_is_sharded_over_two_devices(two_devices):
    assert [whole // own for whole, own in zip(*two_devices["qkv"], strict=True)] == [1, 1, 2, 1]


class WordPrompts(Prompts):
    """Without the special tokens of the tiny tokenizer, which are the last ones."""

    def text(self, n):
        return self.random.choice(800, n).tolist()


@pytest.mark.slow
def test_logits_of_glm_ocr_are_those_of_the_model(tmp_path):
    """The member of the family of another structure that vLLM has a processor for."""
    directory = checkpoint("ocr", tmp_path)
    model, runner = Glm4vForConditionalGeneration.from_pretrained(directory), Runner(directory, 1)
    prompts = WordPrompts(model.config, [[4, ("image", (4, 6)), 3]])
    (sequence,) = sequences(prompts)
    (logits,) = runner.run([(sequence, len(sequence.tokens))], 32)
    np.testing.assert_allclose(logits, model(**prompts.inputs).logits[0], rtol=0, atol=1e-4)


@pytest.mark.slow
def test_an_adapter_is_merged_into_the_weights(ours, checkpoints, runner, tmp_path):
    model = ours("base")
    adapted = trained(model.module)
    save_adapter(adapted, tmp_path)
    with_adapter = Runner(checkpoints("base"), 1, additional_config={"glm4v_adapter": str(tmp_path)})
    assert [leaf.shape for leaf in with_adapter.leaves] == [leaf.shape for leaf in runner.leaves]
    (text, *_), prompts = sequences(prompts_of(model.config)), Prompts(model.config, [ROWS[TEXT]], seed=5)
    (logits,) = with_adapter.run([(text, len(text.tokens))], 16)
    merged = Glm4vForConditionalGeneration(model.config, module=merge_lora(adapted))
    np.testing.assert_allclose(logits, merged(**prompts.inputs).logits[0], rtol=0, atol=1e-4)


def test_positions_are_those_of_the_rope_index(runner):
    prompts = prompts_of(runner.model.engine.config)
    grids = prompts.image_grid_thw, prompts.video_grid_thw
    expected, deltas = rope_index(prompts.input_ids, prompts.config, *grids, prompts.attention_mask)
    for row, sequence in enumerate(sequences(prompts)):
        positions, delta = runner.model.get_mrope_input_positions(sequence.tokens, sequence.features)
        assert np.array_equal(positions, expected[:, row, prompts.real[row]])
        # That of the reference counts padding.
        assert delta == deltas[row, 0] + prompts.input_ids.shape[1] - len(sequence.tokens)


def test_tokens_that_a_user_writes_are_no_images(runner):
    config = runner.model.engine.config
    written = [5, config.video_start_token_id, config.image_token_id, 6]
    positions, delta = runner.model.get_mrope_input_positions(written, [])
    assert positions.tolist() == [[0, 1, 2, 3]] * 3 and delta == 0
    _, images, *_ = sequences(prompts_of(config))
    for image in images.features:
        image.mm_position.offset += len(written)
    after, _ = runner.model.get_mrope_input_positions(written + images.tokens, images.features)
    for image in images.features:
        image.mm_position.offset -= len(written)
    alone, _ = runner.model.get_mrope_input_positions(images.tokens, images.features)
    assert np.array_equal(after[:, len(written) :], alone + len(written))


def test_a_video_whose_prompt_has_no_frame_is_text(runner, caplog):
    """As vLLM 0.32 writes a video of less than half a second: its grid has one frame, its prompt none."""
    config = runner.model.engine.config
    marks = [config.video_start_token_id, config.video_end_token_id]
    short = feature("video", (1, 4, 4), 2, marks, None, config.image_token_id)
    positions, delta = runner.model.get_mrope_input_positions([5, 6, *marks, 7], [short])
    assert positions.tolist() == [[0, 1, 2, 3, 4]] * 3 and delta == 0
    assert "video: found 0 tokens in its prompt; expected 4" in caplog.text


def test_images_of_a_call_are_encoded_as_alone_and_invalid_pixels_are_zeros(runner, caplog):
    prompts = prompts_of(runner.model.engine.config)
    pixels, grids = prompts.pixel_values.copy(), prompts.image_grid_thw
    first, second = grids.prod(axis=1)
    with jax.set_mesh(runner.mesh):
        together = runner.model.embed_multimodal(pixel_values=pixels, image_grid_thw=grids)
        (alone,) = runner.model.embed_multimodal(pixel_values=pixels[first:], image_grid_thw=grids[1:])
        assert not caplog.records
        pixels[3, 7], pixels[4, 8] = np.nan, np.inf
        invalid = runner.model.embed_multimodal(pixel_values=pixels, image_grid_thw=grids)
        pixels[3, 7] = pixels[4, 8] = 0
        zeros = runner.model.embed_multimodal(pixel_values=pixels, image_grid_thw=grids)
    assert [features.shape[0] for features in together] == [first // 4, second // 4]
    assert np.array_equal(together[1], alone) and np.array_equal(invalid[1], alone)
    assert np.array_equal(invalid[0], zeros[0]) and not np.array_equal(invalid[0], together[0])
    assert {features.sharding.mesh for features in together} == {runner.mesh}
    assert "1 of 2 images or videos" in caplog.text


def test_options_that_are_refused_are_refused_before_anything_is_read(runner):
    with pytest.raises(ConfigError, match="--pipeline-parallel-size: found 2"):
        Glm4vForVllm(vllm_config("absent", pipeline_parallel_size=2), None, runner.mesh)


def test_weights_are_read_where_and_as_the_settings_say(runner, checkpoints, monkeypatch):
    seen = {}

    def load(directory, **options):
        seen.update(options, directory=directory)
        raise InterruptedError

    monkeypatch.setattr(model_file, "load_runtime", load)
    settings = {"glm4v_checkpoint": str(checkpoints("base")), "glm4v_quantize": "int8", "glm4v_adapter": "adapter"}
    model = Glm4vForVllm(vllm_config(checkpoints("base"), additional_config=settings), None, runner.mesh)
    with pytest.raises(InterruptedError):
        model.load_weights(None)
    assert seen["directory"] == checkpoints("base") and seen["dtype"] == "float32" and not seen["stacked"]
    assert (seen["quantize"], seen["adapter"]) == ("int8", "adapter")
    model.engine.settings = VllmSettings(glm4v_checkpoint=str(checkpoints("odd")))
    with pytest.raises(ConfigError, match="num_key_value_heads: found 1; expected 2"):
        model.load_weights(None)


def test_every_shape_of_the_vit_is_handed_to_the_runner(runner, monkeypatch):
    monkeypatch.setattr(model_file, "shapes_of", lambda *_: [(1, 32), (2, 128)])
    handed = []
    runner.model.precompile_vision_encoder(lambda *args, **labels: handed.append((args, labels)))
    assert [(args[0], args[2]) for args, _ in handed] == [("glm4v_vision", (1, 32)), ("glm4v_vision", (2, 128))]
    assert handed[1][1] == {"rows": 2, "patches": 128}
    (_, run, shape), _ = handed[0]
    with jax.set_mesh(runner.mesh):
        assert run(shape).shape == (8, 8, 64)


def on_two_devices(directory):
    engine = Runner(directory, 2)
    kernel = getattr(engine.model.engine.vision.visual.module.blocks, "0").attn.qkv.kernel[...]
    return dict(
        logits=logits_of(engine), collectives=engine.collectives(16), features=features_of(engine),
        qkv=(kernel.shape, kernel.addressable_shards[0].data.shape),
    )  # fmt: skip
