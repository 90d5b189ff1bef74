"""Each kind of checkpoint against transformers 5.24; see `tests/golden/make_family_goldens.py`."""

import numpy as np
import pytest
from helpers_family import CASES, GOLDEN, KINDS, NEW, chat_of, digest, pixel_digest, video
from reference import TOLERANCE

from glm4v_jax import Glm4vForConditionalGeneration
from glm4v_jax.config.model import Glm4vConfig
from glm4v_jax.inputs.mrope import rope_index
from glm4v_jax.inputs.processor import Glm4vProcessor

PIXELS = ("pixel_values", "pixel_values_videos")


class Ours:
    """What this package makes of the cases with a checkpoint of the kind, each thing once."""

    def __init__(self, kind, directory):
        self.kind, self.directory = kind, directory
        # Pillow's class, as in the goldens; that the files' names are known is tested with the processor.
        self.processor = Glm4vProcessor.from_pretrained(directory, use_fast=False)
        self.golden = dict(np.load(GOLDEN / f"{kind}.npz"))

    def model(self, stacked):
        return Glm4vForConditionalGeneration.from_pretrained(self.directory, dtype="float32", stacked=stacked)

    def expected(self, case):
        return {name.partition("/")[2]: value for name, value in self.golden.items() if name.startswith(f"{case}/")}

    def prompt(self, case):
        return self.processor.apply_chat_template(
            tokenize=False, add_generation_prompt=True, **chat_of(self.kind, CASES[case])
        )

    def inputs(self, *cases, **more):
        """The processor's outputs for these cases as the rows of a batch."""
        given = {
            name: [item for case in cases for item in CASES[case].get(key, [])] or None
            for name, key in (("images", "images"), ("videos", "videos"), ("video_metadata", "metadata"))
        }
        given = {name: value for name, value in given.items() if value is not None}
        return self.processor(text=[self.prompt(case) for case in cases], **given, **more)


@pytest.fixture(scope="module", params=KINDS)
def ours(request, family_checkpoint):
    return Ours(request.param, family_checkpoint(request.param))


def test_the_goldens_are_of_this_checkpoint(ours):
    """Where this fails: `make family-goldens`."""
    assert ours.golden["checkpoint"] == digest(ours.directory)


@pytest.mark.parametrize("case", CASES)
def test_prompts_grids_frames_pixels_and_positions_equal(ours, case):
    expected = ours.expected(case)
    found = ours.inputs(case, return_metadata=True)
    assert found.input_ids[0].tolist() == expected["input_ids"].tolist()
    for name in ("image_grid_thw", "video_grid_thw"):
        assert np.array_equal(found.get(name, []), expected.get(name, []))
    if "frames" in expected:
        assert list(found["video_metadata"][0].frames_indices) == expected["frames"].tolist()
    for name in PIXELS:
        assert (name in found) == (f"{name}.sha256" in expected)
        if name in found:
            sample = found[name][:: max(1, len(found[name]) // 5), ::147]
            np.testing.assert_allclose(sample, expected[f"{name}.sample"], rtol=0, atol=1e-6)
            assert pixel_digest(found[name]) == expected[f"{name}.sha256"].tobytes()
    config = Glm4vConfig.from_pretrained(ours.directory)
    grids = (found.get("image_grid_thw"), found.get("video_grid_thw"))
    merge = config.vision_config.spatial_merge_size
    positions, deltas = rope_index(found.input_ids, config, *grids, found.attention_mask, merge)
    assert np.array_equal(positions[:, 0], expected["position_ids"])
    assert np.array_equal(np.ravel(deltas), expected["rope_deltas"][0])


@pytest.mark.parametrize(("options", "grid"), [({}, [1, 8, 6]), ({"patch_expand_factor": 2}, [1, 8, 4])])
def test_an_option_of_glm_ga_alone_reaches_its_processors(family_checkpoint, options, grid):
    """The grids are the reference's, of a video as of an image of this size."""
    processor = Glm4vProcessor.from_pretrained(family_checkpoint("glmga"))
    frames = video(5, 78, 43, 1)
    prompt = "<|begin_of_image|><|image|><|end_of_image|><|begin_of_video|><|video|><|end_of_video|>"
    clip = [{"total_num_frames": 5, "fps": 10}]
    made = processor(images=[frames[0]], text=[prompt], videos=[frames], video_metadata=clip, **options)
    assert made.video_grid_thw.tolist() == made.image_grid_thw.tolist() == [grid]


def test_messages_that_hold_their_images_and_videos_make_the_same_inputs(ours):
    """Also where these stand in what a tool answers."""
    case = CASES["everything"]
    media = {name: iter(case[f"{name}s"]) for name in ("image", "video")}

    def filled(item):
        return {**item, item["type"]: next(media[item["type"]])} if item["type"] in media else item

    chat = chat_of(ours.kind, case)
    conversation = [
        {**m, "content": [filled(item) for item in m["content"]] if isinstance(m["content"], list) else m["content"]}
        for m in chat.pop("conversation")
    ]
    found = ours.processor.apply_chat_template(
        conversation, **chat, add_generation_prompt=True, tokenize=True, return_dict=True,
        video_metadata=case["metadata"], do_sample_frames=True,
    )  # fmt: skip
    expected = ours.expected("everything")
    assert found.input_ids[0].tolist() == expected["input_ids"].tolist()
    for name in PIXELS:
        assert pixel_digest(found[name]) == expected[f"{name}.sha256"].tobytes()


def test_time_texts(ours):
    text = ours.processor.tokenizer.decode(ours.inputs("video").input_ids[0])
    assert ("<|end_of_image|>1.7 seconds" in text) == (ours.kind in ("flash", "ocr"))
    assert ("<|end_of_image|>1<|end_of_video|>" in text) == (ours.kind == "glm4v")


@pytest.mark.slow
def test_logits_and_greedy_choices_equal(ours, mesh):
    """All cases as rows of one batch, each followed by the tokens that the reference chose: one program.

    Of layers one by one, as on a CPU; `test_greedy_tokens_equal` has them stacked, as on every accelerator.
    """
    inputs = ours.inputs(*CASES, padding=True)
    chosen = np.stack([ours.expected(case)["tokens"] for case in CASES])
    ids = np.concatenate([inputs.input_ids, chosen[:, :-1]], axis=1)
    mask = np.concatenate([inputs.attention_mask, np.ones_like(chosen[:, :-1])], axis=1)
    logits = np.asarray(ours.model(stacked=False)(**{**inputs, "input_ids": ids, "attention_mask": mask}).logits)
    assert np.array_equal(logits[:, -NEW:].argmax(axis=-1), chosen)
    for row, case in enumerate(CASES):
        expected = ours.expected(case)
        found = logits[row][mask[row] == 1][expected["rows"], ::13]
        difference = np.abs(found - expected["logits"]).max() / np.abs(expected["logits"]).max()
        assert difference <= TOLERANCE, case


@pytest.mark.slow
@pytest.mark.parametrize("ours", ["flash", "ocr"], indirect=True)
def test_greedy_tokens_equal(ours, mesh):
    """Through prefill, cache and decoding steps; the other kinds have the programs of `flash`."""
    inputs = ours.inputs(*CASES, padding=True)
    model = ours.model(stacked=True)
    tokens = model.generate(**inputs, max_new_tokens=NEW, do_sample=False, eos_token_id=-1)[:, -NEW:]
    for row, case in zip(tokens, CASES, strict=True):
        assert row.tolist() == ours.expected(case)["tokens"].tolist(), case
