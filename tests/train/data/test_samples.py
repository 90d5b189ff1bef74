"""Records as tokens and targets: the processor's tokens, the assistant's texts as targets and nothing else."""

import dataclasses
import json
import subprocess
import sys

import numpy as np
import PIL.Image
import pytest
from helpers_checkpoints import RANDOM_CHECKPOINT
from helpers_tokenizer import FAMILY_TEMPLATE, GOLDEN, write_small_tokenizer
from helpers_transformers import import_transformers

from glm4v_jax.config.model import Glm4vConfig
from glm4v_jax.errors import CheckpointError, DataError
from glm4v_jax.generate.prompt import prompt_of
from glm4v_jax.inputs.mrope import rope_index
from glm4v_jax.inputs.processor import Glm4vProcessor
from train.data.records import Record
from train.data.samples import IGNORED, EncodeOptions, Sample, encode, limited
from train.evaluate import question_of

CONFIG = Glm4vConfig.from_dict(json.loads((RANDOM_CHECKPOINT / "config.json").read_text()))
THOUGHT = "<think>It is dark.</think><answer>A <|begin_of_box|>cat<|end_of_box|>.</answer>"
BARE = "A <|begin_of_box|>cat<|end_of_box|>."
STOP = "<|user|>"


@pytest.fixture(scope="module")
def processor():
    return Glm4vProcessor.from_pretrained(RANDOM_CHECKPOINT)


@pytest.fixture(scope="module")
def theirs():
    import_transformers()
    from transformers import AutoTokenizer
    from transformers.models.glm4v import image_processing_glm4v, processing_glm4v, video_processing_glm4v

    return processing_glm4v.Glm4vProcessor(
        image_processing_glm4v.Glm4vImageProcessor.from_pretrained(RANDOM_CHECKPOINT),
        AutoTokenizer.from_pretrained(RANDOM_CHECKPOINT),
        video_processing_glm4v.Glm4vVideoProcessor.from_pretrained(RANDOM_CHECKPOINT),
        chat_template=(RANDOM_CHECKPOINT / "chat_template.jinja").read_text(),
    )


def text(value):
    return {"type": "text", "text": value}


def picture(height=84, width=140, seed=0):
    values = np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)
    return {"type": "image", "image": PIL.Image.fromarray(values)}


def frames(count=8, height=56, width=84, seed=1):
    return np.random.default_rng(seed).integers(0, 256, (count, height, width, 3), np.uint8)


def video(count=8, **more):
    return {"type": "video", "video": frames(count), **more}


def system(value):
    return {"role": "system", "content": [text(value)]}


def user(*items):
    return {"role": "user", "content": [text(item) if isinstance(item, str) else item for item in items]}


def assistant(value):
    return {"role": "assistant", "content": [text(value)]}


def record(*messages, losses=None, source="data.jsonl:7"):
    losses = tuple(m["role"] == "assistant" for m in messages) if losses is None else losses
    return Record(messages=messages, losses=losses, source=source)


def learned(sample: Sample, tokenizer) -> list[str]:
    """What is learned, one text a stretch of targets."""
    is_target = sample.targets != IGNORED
    edges = np.flatnonzero(np.diff(np.concatenate([[0], is_target.astype(int), [0]])))
    return [tokenizer.decode(sample.targets[a:b]) for a, b in zip(edges[::2], edges[1::2], strict=True)]


def patches_of(sample):
    """float32 [P, 1176]: the patches of all images and videos."""
    return np.concatenate([np.zeros((0, 1176), np.float32), *(medium.patches for medium in sample.prompt.media)])


CONVERSATIONS = {
    "text": (user("Hi"), assistant("Hello")),
    "system": (system("Be brief."), user("Hi"), assistant(THOUGHT)),
    "picture": (user(picture(), "What is it?"), assistant(THOUGHT)),
    "two pictures, several turns": (
        user(picture(), "one"), assistant("A dog"), user("and", picture(56, 84, 3), "?"), assistant(THOUGHT),
    ),
    "thoughts in several turns": (user(picture(), "one"), assistant(THOUGHT), user("two"), assistant(THOUGHT)),
    "characters of many bytes": (user("你好"), assistant("<think>好</think>\n<answer>猫🐈</answer>")),
    "an answer that begins with spaces": (user("Hi"), assistant("  x = 1  ")),
}  # fmt: skip


@pytest.mark.parametrize("name", CONVERSATIONS)
def test_tokens_are_those_of_the_processor(processor, name):
    messages = CONVERSATIONS[name]
    sample = encode(record(*messages), processor, CONFIG, EncodeOptions(keep_thoughts="all"))
    inputs = processor.apply_chat_template(messages, tokenize=True, return_dict=True)
    np.testing.assert_array_equal(sample.input_ids, inputs["input_ids"][0])
    assert np.array_equal(patches_of(sample), inputs.get("pixel_values", np.zeros((0, 1176))))
    assert sample.input_ids.dtype == sample.targets.dtype == sample.position_ids.dtype == np.int32
    assert all(medium.patches.dtype == np.float32 for medium in sample.prompt.media) and sample.frames.dtype == np.int64


@pytest.mark.parametrize("name", CONVERSATIONS)
def test_tokens_are_those_of_the_reference(processor, theirs, name):
    # The template prints the Python repr of a list for all roles but the user's, and 4.57.1 lets it.
    messages = CONVERSATIONS[name]
    plain = [m if m["role"] == "user" else {**m, "content": m["content"][0]["text"]} for m in messages]
    images = [item["image"] for m in messages for item in m["content"] if item["type"] == "image"]
    expected = theirs(text=[theirs.apply_chat_template(plain)], images=images or None, return_tensors="np")
    sample = encode(record(*CONVERSATIONS[name]), processor, CONFIG, EncodeOptions(keep_thoughts="all"))
    np.testing.assert_array_equal(sample.input_ids, expected["input_ids"][0])
    if "pixel_values" in expected:
        np.testing.assert_array_equal(patches_of(sample), expected["pixel_values"])


@pytest.mark.parametrize("rate", [None, 4])
def test_a_video_of_frames_equals_the_reference(processor, theirs, rate):
    given = video() if rate is None else video(fps=rate)
    messages = (user(given, "Where does it go?"), assistant(THOUGHT))
    sample = encode(record(*messages), processor, CONFIG)
    times = {"video_metadata": [{"total_num_frames": 8, "fps": rate or 2, "frames_indices": list(range(8))}]}
    prompt = theirs.apply_chat_template([messages[0], {"role": "assistant", "content": THOUGHT}])
    expected = theirs(text=[prompt], videos=[frames()], do_sample_frames=False, return_tensors="pt", **times)
    np.testing.assert_array_equal(sample.input_ids, expected["input_ids"][0])
    assert sample.frames.tolist() == [[4, 6]] * 4
    # Torchvision resizes there and Pillow here: one step of eight bits.
    np.testing.assert_allclose(patches_of(sample), expected["pixel_values_videos"], rtol=0, atol=1.01 / 255 / 0.2613)
    assert learned(sample, processor.tokenizer) == [THOUGHT + STOP]
    # A patch holds two frames, so the second one begins after a second, or half of one.
    second = f"0<|begin_of_image|>{'<|image|>' * 6}<|end_of_image|>{0 if rate else 1}"
    assert second in processor.decode(sample.input_ids)


def test_a_video_file_is_sampled(processor, tmp_path):
    PIL.Image.fromarray(frames()[0]).save(
        tmp_path / "v.gif", save_all=True, append_images=[PIL.Image.fromarray(f) for f in frames()[1:]], duration=250
    )
    messages = (user({"type": "video", "path": str(tmp_path / "v.gif")}, "x"), assistant("y"))
    sample = encode(record(*messages), processor, CONFIG)
    expected = processor.apply_chat_template(messages, tokenize=True, return_dict=True)
    np.testing.assert_array_equal(sample.input_ids, expected["input_ids"][0])
    np.testing.assert_array_equal(patches_of(sample), expected["pixel_values_videos"])
    denser = encode(record(*messages), processor, CONFIG, EncodeOptions(video_fps=4.0))
    expected = processor.apply_chat_template(messages, tokenize=True, return_dict=True, fps=4.0)
    np.testing.assert_array_equal(denser.input_ids, expected["input_ids"][0])
    assert len(denser.frames) == 2 * len(sample.frames) == 4
    # What a row asks for itself counts more than the job's.
    messages = (user({"type": "video", "path": str(tmp_path / "v.gif"), "fps": 4, "max_pixels": 784}, "x"), messages[1])
    own = encode(record(*messages), processor, CONFIG, EncodeOptions(video_fps=1.0))
    assert own.frames.tolist() == [[2, 2]] * 4


def test_frames_may_be_files(processor, tmp_path):
    names = [str(tmp_path / f"{index}.png") for index in range(8)]
    for name, frame in zip(names, frames(), strict=True):
        PIL.Image.fromarray(frame).save(name)
    found = encode(record(user({"type": "video", "video": names}), assistant("y")), processor, CONFIG)
    expected = encode(record(user(video()), assistant("y")), processor, CONFIG)
    np.testing.assert_array_equal(found.input_ids, expected.input_ids)
    np.testing.assert_array_equal(patches_of(found), patches_of(expected))


def test_images_and_videos_in_one_sample_keep_their_order(processor):
    messages = (user(video(4), "and", picture(), video(6)), assistant("a"), user(picture(56, 84, 3)), assistant("b"))
    sample = encode(record(*messages), processor, CONFIG)
    grids = np.array([[1, 6, 10], [1, 6, 8]]), np.array([[2, 4, 6], [3, 4, 6]])
    prompt, in_prompt = sample.prompt, [grids[1][0], grids[0][0], grids[1][1], grids[0][1]]
    assert [medium.grid.tolist() for medium in prompt.media] == [grid.tolist() for grid in in_prompt]
    is_vision = sample.input_ids == CONFIG.image_token_id
    assert prompt.medium_of[is_vision].tolist() == [0] * 12 + [1] * 15 + [2] * 18 + [3] * 12
    expected = np.concatenate([np.arange(grid.prod() // 4) for grid in in_prompt])
    assert np.array_equal(prompt.offset_of[is_vision], expected) and (prompt.medium_of[~is_vision] == -1).all()
    positions, _ = rope_index(sample.input_ids[None], CONFIG, *grids)
    np.testing.assert_array_equal(sample.position_ids, positions[:, 0])
    assert learned(sample, processor.tokenizer) == ["a" + STOP, "b" + STOP]


@pytest.mark.parametrize("name", CONVERSATIONS)
def test_targets_are_the_texts_of_the_assistant(processor, name):
    messages = CONVERSATIONS[name]
    sample = encode(record(*messages), processor, CONFIG, EncodeOptions(keep_thoughts="all"))
    said = [message["content"][0]["text"] + STOP for message in messages if message["role"] == "assistant"]
    assert learned(sample, processor.tokenizer) == said


@pytest.mark.parametrize("name", CONVERSATIONS)
def test_every_target_is_the_next_token(processor, name):
    """Moving the targets by one in either direction is seen here; the stop token behind the last turn is no input."""
    sample = encode(record(*CONVERSATIONS[name]), processor, CONFIG, EncodeOptions(keep_thoughts="all"))
    following = np.append(sample.input_ids[1:], processor.tokenizer.convert_tokens_to_ids(STOP))
    is_target = sample.targets != IGNORED
    assert np.array_equal(sample.targets[is_target], following[is_target])
    assert sample.num_targets == is_target.sum()
    for shifted in (np.roll(sample.targets, 1), np.roll(sample.targets, -1)):
        moved = shifted != IGNORED
        assert not np.array_equal(shifted[moved], following[moved])


@pytest.mark.parametrize("name", CONVERSATIONS)
def test_the_tokens_before_an_answer_are_the_prompt_for_it(processor, name):
    """What generation starts from is what training conditions on: all turns' thoughts but the last are gone in both."""
    messages = CONVERSATIONS[name]
    sample = encode(record(*messages), processor, CONFIG)
    history = [
        assistant(BARE) if m["role"] == "assistant" and m["content"][0]["text"] == THOUGHT else m for m in messages[:-1]
    ]
    prompt = prompt_of(history, processor, CONFIG)
    start = len(prompt)
    np.testing.assert_array_equal(sample.input_ids[:start], prompt.input_ids)
    np.testing.assert_array_equal(sample.position_ids[:, :start], prompt.position_ids)
    assert sample.targets[start - 1] == sample.input_ids[start] and (sample.targets[start - 1 :] != IGNORED).all()
    # An answer that follows one without a prompt of its own would be learned from elsewhere.
    assert start < 2 or sample.targets[start - 2] == IGNORED


def test_line_breaks_before_an_answer_are_removed(processor, tmp_path):
    """With the merges of the released tokenizer they would fuse with the line break of the header."""
    merges = [("Ċ", "Ċ"), ("Ġ", "Ġ")]
    write_small_tokenizer(tmp_path, merges)
    for path in (GOLDEN / "checkpoint").iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    merged = Glm4vProcessor.from_pretrained(tmp_path)
    assert len(merged.tokenizer.encode("\n\n")) == 1
    data = CONFIG.to_dict()
    data["text_config"]["eos_token_id"] = [merged.tokenizer.convert_tokens_to_ids(STOP)]
    config = Glm4vConfig.from_dict(data)
    sample = encode(record(user("Hi"), assistant("\n \n  one\n\ntwo\n")), merged, config)
    assert learned(sample, merged.tokenizer) == ["  one\n\ntwo\n" + STOP]
    prompt = merged.apply_chat_template([user("Hi")], add_generation_prompt=True, tokenize=True)[0]
    np.testing.assert_array_equal(sample.input_ids[: len(prompt)], prompt)


def test_keep_thoughts_chooses_thoughts_and_targets(processor):
    conversation = record(user("one"), assistant(THOUGHT), user("two"), assistant("No."), user("3"), assistant(THOUGHT))
    found = {}
    for keep in ("last", "all", "none"):
        sample = encode(conversation, processor, CONFIG, EncodeOptions(keep_thoughts=keep))
        found[keep] = learned(sample, processor.tokenizer), processor.decode(sample.input_ids).count("<think>")
    # A turn that lost its thought is not learned, or the model would learn to answer without one.
    assert found["last"] == (["No." + STOP, THOUGHT + STOP], 1)
    assert found["all"] == ([THOUGHT + STOP, "No." + STOP, THOUGHT + STOP], 2)
    assert found["none"] == ([BARE + STOP, "No." + STOP, BARE + STOP], 0)


def test_a_template_that_writes_thoughts_says_how(processor):
    """An answer without tags may speak of them; a turn without a thought has an empty one."""
    parts = processor.image_processor, processor.tokenizer, processor.video_processor
    family, said = Glm4vProcessor(*parts, FAMILY_TEMPLATE), "<think>Hm.</think>\nAn <answer> tag."
    conversation = record(user("one"), assistant(said), user("two"), assistant(said))
    for keep, thought in (("last", "Hm."), ("none", "")):
        sample = encode(conversation, family, CONFIG, EncodeOptions(keep_thoughts=keep))
        assert learned(sample, family.tokenizer)[-1] == f"<think>{thought}</think>\nAn <answer> tag.{STOP}"


def test_losses_choose_the_target_turns(processor):
    messages = (user("one"), assistant(THOUGHT), user("two"), assistant(THOUGHT))
    sample = encode(record(*messages, losses=(False, True, False, False)), processor, CONFIG)
    # The last turn that is learned keeps its thought.
    assert learned(sample, processor.tokenizer) == [THOUGHT + STOP]
    assert processor.decode(sample.input_ids) == (
        f"[gMASK]<sop><|user|>\none<|assistant|>\n{THOUGHT}<|user|>\ntwo<|assistant|>\n{BARE}"
    )


def test_a_conversation_that_the_assistant_begins(processor):
    sample = encode(record(assistant("Once upon a time")), processor, CONFIG)
    assert learned(sample, processor.tokenizer) == ["Once upon a time" + STOP]


def test_the_stop_token_is_one_that_ends_generation(processor):
    sample = encode(record(user("Hi"), assistant(THOUGHT)), processor, CONFIG)
    ends = json.loads((RANDOM_CHECKPOINT / "generation_config.json").read_text())["eos_token_id"]
    assert sample.targets[-1] in ends and sample.input_ids[-1] in ends  # and so does `</answer>`
    other = dataclasses.replace(CONFIG.text_config, eos_token_id=processor.tokenizer.eos_token_id)
    sample = encode(record(user("Hi"), assistant("x")), processor, dataclasses.replace(CONFIG, text_config=other))
    assert learned(sample, processor.tokenizer) == ["x<|endoftext|>"]
    other = dataclasses.replace(CONFIG.text_config, eos_token_id=(5,))
    with pytest.raises(CheckpointError, match=r"eos_token_id: found \[5\]; expected 775 \(<\|user\|>\)"):
        encode(record(user("Hi"), assistant("x")), processor, dataclasses.replace(CONFIG, text_config=other))


def test_templates_that_do_not_separate_turns_are_refused(processor):
    def with_template(template):
        parts = processor.image_processor, processor.tokenizer, processor.video_processor
        return Glm4vProcessor(*parts, chat_template=template)

    body = "{% for m in messages %}<|{{ m.role }}|>{{ m.content if m.content is string else m.content[0].text }}"
    with pytest.raises(CheckpointError, match="writes text after an answer"):
        encode(record(user("a"), assistant("b")), with_template(body + "\n{% endfor %} 'user' 'assistant'"), CONFIG)
    asked = "{% endfor %}{% if add_generation_prompt %}<|user|>{% endif %}{% if false %}'user''assistant'{% endif %}"
    counting = "{{ messages | length }}{% if false %}'user''assistant'{% endif %}"
    with pytest.raises(DataError, match=r"data\.jsonl:7: found a chat template that writes message 1"):
        encode(record(user("a"), assistant("b")), with_template(body + asked), CONFIG)
    with pytest.raises(CheckpointError, match="writes text after an answer"):
        encode(record(user("a"), assistant("b")), with_template(counting + body + "{% endfor %}"), CONFIG)


PROBLEMS = {
    "no loss": (record(user("a"), assistant("b"), losses=(False, False)), "losses: found no message that "),
    "loss on the user": (record(user("a"), assistant("b"), losses=(True, True)), "message 0: found loss on role"),
    "too few losses": (
        record(user("a"), assistant("b"), losses=(True,)),
        "losses: found 1; expected one per message, 2",
    ),
    "empty answer": (record(user("a"), assistant(" \n")), "message 1: found an empty answer"),
    "no such picture": (record(user({"type": "image", "path": "/no/x.png"}), assistant("b")), "image 0: /no/x.png"),
    "placeholder in the text": (record(user("a <|image|>"), assistant("b")), "found 1 <|image|> placeholder"),
    "picture of the assistant": (
        record(user("a"), {"role": "assistant", "content": [picture()]}),
        "message 1: the chat template takes only text",
    ),
}


@pytest.mark.parametrize("name", PROBLEMS)
def test_errors_begin_with_the_place_of_the_record(processor, name):
    given, message = PROBLEMS[name]
    with pytest.raises(DataError, match=r"^data\.jsonl:7: ") as caught:
        encode(given, processor, CONFIG)
    assert message in str(caught.value)


def test_long_samples_are_refused_or_dropped(processor):
    messages = (user(picture(), "one"), assistant("first"), user(video(), "two"), assistant("second"))
    whole = encode(record(*messages), processor, CONFIG)
    assert len(encode(record(*messages), processor, CONFIG, EncodeOptions(max_length=len(whole)))) == len(whole)
    short = EncodeOptions(max_length=len(whole) - 1)
    with pytest.raises(
        DataError, match=rf"^data\.jsonl:7: found {len(whole)} tokens; expected at most {len(whole) - 1}: batch"
    ):
        encode(record(*messages), processor, CONFIG, short)
    assert encode(record(*messages), processor, CONFIG, dataclasses.replace(short, too_long="drop")) is None


def test_cutting_keeps_images_and_videos_whole(processor):
    last = user(video(), "two", picture(56, 84))
    conversation = record(user(picture(), "one"), assistant("first"), last, assistant("x"))
    whole = encode(conversation, processor, CONFIG)
    ids = whole.input_ids.tolist()
    first_picture = ids.index(CONFIG.image_start_token_id), ids.index(CONFIG.image_end_token_id)
    the_video = ids.index(CONFIG.video_start_token_id), ids.index(CONFIG.video_end_token_id)
    tags = CONFIG.image_start_token_id, CONFIG.image_end_token_id
    last_picture = [len(ids) - 1 - ids[::-1].index(tag) for tag in tags]
    answer = int(np.flatnonzero(whole.targets != IGNORED)[0])
    for length in range(1, len(whole)):
        options = EncodeOptions(max_length=length, too_long="cut")
        if length <= answer:
            with pytest.raises(DataError, match="found no target in the first"):
                encode(conversation, processor, CONFIG, options)
            continue
        sample = encode(conversation, processor, CONFIG, options)
        inside = next((a for a, b in (first_picture, the_video, last_picture) if a < length <= b), None)
        n = length if inside is None else inside
        assert len(sample) == n
        for name in ("input_ids", "targets", "position_ids"):
            np.testing.assert_array_equal(getattr(sample, name), getattr(whole, name)[..., :n], err_msg=name)
        # An image, a video and an image: each stays with all its tokens, or goes.
        kept = 1 + (n > the_video[1]) + (n > last_picture[1])
        assert [m.key for m in sample.prompt.media] == [m.key for m in whole.prompt.media[:kept]]
        for name in ("medium_of", "offset_of"):
            np.testing.assert_array_equal(getattr(sample.prompt, name), getattr(whole.prompt, name)[:n])


def test_pixels_of_images_and_videos_are_limited(processor):
    messages = (user(picture(280, 280), video(4)), assistant("b"))
    free = encode(record(*messages), processor, CONFIG)
    caps = EncodeOptions(image_max_pixels=112 * 112, video_max_pixels=6272)
    capped = encode(record(*messages), processor, CONFIG, caps)
    assert free.frames.tolist() == [[20, 20], [4, 6], [4, 6]]
    assert capped.frames.tolist() == [[8, 8], [2, 2], [2, 2]]


BAD_OPTIONS = [{"too_long": "left"}, {"keep_thoughts": True}, {"max_length": 0}, {"video_fps": -1}]


@pytest.mark.parametrize("options", BAD_OPTIONS)
def test_invalid_options_are_named(options):
    with pytest.raises(DataError, match=f"{next(iter(options))}: found"):
        EncodeOptions(**options)


def test_the_host_side_imports_no_jax():
    program = "import sys, train.data.packing, train.data.samples; assert not {'jax', 'torch'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", program], check=True, cwd=RANDOM_CHECKPOINT.parents[2])


def test_an_evaluation_prompt_equals_the_training_sample(processor, tmp_path):
    """Its pictures and videos have the sizes and the rate of the options, for the engine too."""
    images = [PIL.Image.fromarray(frame) for frame in frames()]
    images[0].save(tmp_path / "v.gif", save_all=True, append_images=images[1:], duration=250)
    shown = (picture(280, 280), video(6), video(4, fps=2), {"type": "video", "path": str(tmp_path / "v.gif")})
    asked = record(user(*shown, "x"), assistant("y"))
    options = EncodeOptions(image_max_pixels=112 * 112, video_max_pixels=6272, video_fps=4.0)
    seen, sample = limited(processor, options), encode(asked, processor, CONFIG, options)
    messages, expected = question_of(asked, seen.video_processor.fps)
    prompt = prompt_of(messages, seen, CONFIG)
    np.testing.assert_array_equal(prompt.input_ids, sample.input_ids[: len(prompt)])
    np.testing.assert_array_equal(prompt.position_ids, sample.position_ids[:, : len(prompt)])
    assert expected == "y" and len(sample) == len(prompt) + 1
    assert len(sample.input_ids) < len(encode(asked, processor, CONFIG).input_ids)
    assert processor.video_processor.fps == 2 and processor.image_processor.size != seen.image_processor.size
