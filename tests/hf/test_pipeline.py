"""`pipeline`: every way to call it equals the reference's; and what it refuses, before there is a model."""

import copy
import types

import numpy as np
import PIL.Image
import pytest
from helpers_checkpoints import RANDOM_CHECKPOINT
from helpers_processor import IMAGE, SQUARE, WIDE, png
from helpers_transformers import import_transformers

from glm4v_jax import pipeline
from glm4v_jax.config.generation import GenerationConfig
from glm4v_jax.errors import ConfigError, GenerationError, MediaError, MessageError
from glm4v_jax.hf.pipeline import MAX_NEW_TOKENS, ImageTextToTextPipeline

pytestmark = pytest.mark.slow

# That of the checkpoint prints lists of the assistant's as Python does (T15).
_TEMPLATE = (
    "[gMASK]<sop>{% for m in messages %}<|{{ m.role }}|>\n{% if m.content is string %}{{ m.content }}{% else %}"
    "{% for i in m.content %}{% if i.type == 'image' %}" + IMAGE + "{% else %}{{ i.text }}{% endif %}{% endfor %}"
    "{% endif %}{% endfor %}{% if add_generation_prompt %}<|assistant|>\n{% endif %}{# 'user' 'assistant' #}"
)


@pytest.fixture(scope="module")
def pipes(mesh):
    """Ours and the reference's, both greedy and of the same checkpoint."""
    transformers = import_transformers()
    theirs = transformers.Glm4vForConditionalGeneration.from_pretrained(RANDOM_CHECKPOINT, dtype="float32")
    theirs.generation_config.do_sample = False
    processor = transformers.AutoProcessor.from_pretrained(RANDOM_CHECKPOINT)
    ours = pipeline(model=RANDOM_CHECKPOINT)
    ours.processor.chat_template = processor.chat_template = _TEMPLATE
    ours.model.generation_config = ours.model.generation_config.replace(do_sample=False)
    return ours, transformers.pipeline("image-text-to-text", model=theirs, processor=processor)


def said(role, *items):
    return {"role": role, "content": [{"type": "text", "text": i} if isinstance(i, str) else dict(i) for i in items]}


WIDE_IMAGE, SQUARE_IMAGE = PIL.Image.fromarray(WIDE), PIL.Image.fromarray(SQUARE)
SLOT = {"type": "image"}
ASKED = [said("user", {"type": "image", "image": WIDE_IMAGE}, "What is this?")]
BEGUN = [said("system", "Be brief."), said("user", "Count to nine."), said("assistant", "One, two, ")]
PROMPT, QUESTION = f"{IMAGE}What is this?", "And this?"

# Arguments of a call; four new tokens unless they say otherwise.
CALLS = {
    "chat": dict(text=ASKED),
    "chat as the only argument": dict(args=(ASKED,)),
    "chat, new text alone": dict(text=ASKED, return_full_text=False),
    "chat that is continued": dict(text=BEGUN),
    "chat that is continued, new text alone": dict(text=BEGUN, return_full_text=False),
    "chat of the assistant, not continued": dict(text=BEGUN, continue_final_message=False),
    "chat of the user, continued": dict(text=[said("user", "Count: one, ")], continue_final_message=True),
    "chat with images beside it": dict(text=[said("user", SLOT, SLOT, "Compare.")], images=[WIDE_IMAGE, SQUARE_IMAGE]),
    "chat with one image beside it": dict(text=[said("user", SLOT, "What?")], images=WIDE_IMAGE),
    "several chats": dict(text=[ASKED, BEGUN]),
    "several chats as the only argument": dict(args=([ASKED, BEGUN],)),
    "several chats with images beside them": dict(
        text=[[said("user", SLOT, text)] for text in "ab"], images=[WIDE_IMAGE, SQUARE_IMAGE]
    ),
    "tokens": dict(text=ASKED, return_tensors=True),
    "tokens of several": dict(text=[ASKED, BEGUN], return_tensors=True),
    "special tokens kept": dict(text=BEGUN, skip_special_tokens=False, return_full_text=False),
    "spaces cleaned up": dict(text=BEGUN, clean_up_tokenization_spaces=True),
    "generate_kwargs": dict(
        text=BEGUN, max_new_tokens=None, generate_kwargs={"max_new_tokens": 3, "repetition_penalty": 1.5}
    ),
    "generate_kwargs beside max_new_tokens": dict(text=BEGUN, generate_kwargs={"repetition_penalty": 1.5}),
    "stop_sequence": dict(text=BEGUN, generate_kwargs={}, stop_sequence="o"),
    "prompt": dict(text=QUESTION),
    "prompt as the only argument": dict(args=(QUESTION,)),
    "prompt, new text alone": dict(text=QUESTION, return_full_text=False),
    "prompts": dict(text=[QUESTION, "Why?"]),
    "prompts as the only argument": dict(args=([QUESTION, "Why?"],)),
    "prompt with an image": dict(images=WIDE_IMAGE, text=PROMPT),
    "prompt with an image, by position": dict(args=(WIDE_IMAGE, PROMPT)),
    "prompt with images": dict(images=[WIDE_IMAGE, SQUARE_IMAGE], text=f"{IMAGE}and {IMAGE}"),
    "prompts with images": dict(images=[WIDE_IMAGE, SQUARE_IMAGE], text=[PROMPT, f"{IMAGE}{QUESTION}"]),
    "prompts with images, tokens": dict(images=[WIDE_IMAGE, SQUARE_IMAGE], text=[PROMPT, PROMPT], return_tensors=True),
    "object with an image": dict(args=({"images": WIDE_IMAGE, "text": PROMPT},)),
    "options of the processor": dict(
        images=WIDE_IMAGE, text=PROMPT, size={"shortest_edge": 12544, "longest_edge": 14000}, return_tensors=True
    ),
}


def called(pipe, args=(), **kwargs):
    kwargs = {"max_new_tokens": 4, **kwargs}
    return copy.deepcopy(
        pipe(*copy.deepcopy(args), **copy.deepcopy({k: v for k, v in kwargs.items() if v is not None}))
    )


def plain(value):
    """A result with arrays and images as what compares equal; the reference wraps conversations beside tokens."""
    value = getattr(value, "messages", value)
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    return value if isinstance(value, str) else np.asarray(value).tolist()


@pytest.mark.parametrize("name", CALLS)
def test_every_way_to_call_it_equals_the_reference(pipes, name):
    ours, theirs = (plain(called(pipe, **CALLS[name])) for pipe in pipes)
    assert ours == theirs


def test_images_from_files_and_addresses_equal_the_reference(pipes, tmp_path):
    (tmp_path / "wide.png").write_bytes(png(WIDE))
    path = str(tmp_path / "wide.png")
    url = {"type": "image_url", "image_url": {"url": path}}
    for kwargs in (dict(images=path, text=PROMPT), dict(text=[said("user", url, "What is this?")])):
        ours, theirs = (plain(called(pipe, **kwargs)) for pipe in pipes)
        assert ours == theirs
    as_text = plain(called(pipes[0], text=[said("user", {**url, "image_url": path}, "What is this?")]))
    assert as_text == ours


@pytest.mark.parametrize("options", [{"max_new_tokens": 3, "repetition_penalty": 1.5}, {"max_length": 40}, {}], ids=str)
def test_generation_config_of_transformers_equals_the_reference(pipes, options):
    """What it leaves at its default is the model's, end tokens among them; without any limit, 20 new tokens."""
    config = import_transformers().GenerationConfig(**options)
    kwargs = {"max_new_tokens": None, "generate_kwargs": {"generation_config": config}}
    ours, theirs = (plain(called(pipe, text=BEGUN, return_tensors=True, **kwargs)) for pipe in pipes)
    assert ours == theirs


def test_generation_config_of_transformers_may_be_the_models(pipes, monkeypatch):
    model, before = pipes[0].model, pipes[0].model.generation_config
    monkeypatch.setattr(model, "generation_config", pipes[1].model.generation_config)
    assert model.generation_config == before


def test_defaults_equal_the_reference(pipes):
    ours, theirs = (pipe.generation_config for pipe in pipes)
    assert ours.max_new_tokens == theirs.max_new_tokens == MAX_NEW_TOKENS == 256
    assert (ours.pad_token_id, list(ours.eos_token_id)) == (theirs.pad_token_id, theirs.eos_token_id)


class _Model:
    """Stands for the model: notes what is asked of it, writes one token."""

    def __init__(self, config):
        self.generation_config, self.calls = config, []

    def generate(self, input_ids, **options):
        self.calls.append((np.asarray(input_ids), options))
        return np.concatenate([input_ids, np.full((len(input_ids), 1), 64)], axis=1)


@pytest.fixture
def noted(pipes):
    """Our pipeline with a model that notes what is asked of it."""
    return ImageTextToTextPipeline(_Model(pipes[0].model.generation_config), pipes[0].processor)


def test_what_the_files_limit_counts(noted):
    noted(text=BEGUN)
    noted.model.generation_config = noted.model.generation_config.replace(max_length=99)
    noted(text=BEGUN)
    (_, first), (_, second) = noted.model.calls
    assert first["generation_config"].max_new_tokens == 256
    assert second["generation_config"].max_new_tokens is None and second["generation_config"].max_length == 99


def test_inputs_of_a_list_run_together_where_asked(noted):
    one = noted(text=[ASKED, BEGUN, BEGUN, ASKED], return_full_text=False)
    together = noted(text=[ASKED, BEGUN, BEGUN, ASKED], return_full_text=False, batch_size=3)
    assert together == one
    assert [len(ids) for ids, _ in noted.model.calls] == [1, 1, 1, 1, 1, 2, 1]
    noted(text=[QUESTION, "Why?", "No."], batch_size=2)
    assert [len(ids) for ids, _ in noted.model.calls[7:]] == [2, 1]


def test_equal_inputs_draw_differently(noted):
    noted(text=[ASKED] * 3, seed=7, do_sample=True)
    list(noted(item for item in (QUESTION, QUESTION)))
    assert [options["seed"] for _, options in noted.model.calls] == [7, 8, 9, 0, 1]


def test_a_generator_is_answered_one_by_one(noted):
    results = noted(item for item in (QUESTION, ASKED))
    assert isinstance(results, types.GeneratorType) and not noted.model.calls
    assert [record["input_text"] for (record,) in results] == [QUESTION, ASKED]


def test_options_beside_generate_kwargs_are_honored(noted):
    """The reference ignores them silently."""
    noted(text=ASKED, do_sample=True, size={"shortest_edge": 12544, "longest_edge": 14000})
    ((ids, options),) = noted.model.calls
    assert options["do_sample"] is True and ids.shape[1] < len(
        noted.processor.apply_chat_template(ASKED, tokenize=True)[0]
    )


def test_contents_that_are_text_are_continued(noted):
    (record,) = noted(text=[{"role": "user", "content": "Count."}, {"role": "assistant", "content": "One, "}])
    assert record["generated_text"][1]["content"] == "One, a"
    assert noted.processor.decode(noted.model.calls[0][0][0]).endswith("<|assistant|>\nOne, ")


def test_text_of_another_name_is_continued(noted):
    refusal = {"type": "refusal", "refusal": "No, "}
    (record,) = noted(text=[said("user", "Count."), said("assistant", refusal)])
    assert record["generated_text"][1]["content"] == [refusal, {"type": "text", "text": "a"}]


def test_defaults_of_a_call_are_those_of_the_pipeline(pipes):
    model = _Model(pipes[0].model.generation_config)
    pipe = ImageTextToTextPipeline(model, pipes[0].processor, max_new_tokens=3, return_full_text=False)
    assert pipe(text=BEGUN)[0]["generated_text"] == "a"
    assert model.calls[0][1]["max_new_tokens"] == 3
    with pytest.raises(ConfigError, match="device='cuda' is not supported"):
        ImageTextToTextPipeline(model, pipes[0].processor, device="cuda")
    with pytest.raises(GenerationError, match="unknown 'device_map'"):
        ImageTextToTextPipeline(model, pipes[0].processor, device_map="auto")


@pytest.mark.parametrize(
    ("args", "kwargs", "error", "message"),
    [
        ((), {}, MessageError, "text: found nothing; expected a prompt or a conversation"),
        ((), {"text": 5}, MessageError, "text: found int"),
        ((), {"text": []}, MessageError, "text: found an empty list"),
        ((), {"text": [[]]}, MessageError, "text: found an empty list"),
        ((), {"text": [ASKED, 5]}, MessageError, "text: found int"),
        ((WIDE_IMAGE,), {}, MessageError, "text: found nothing beside images"),
        ((), {"text": {"role": "user", "content": "Hi"}}, MessageError, "text: found dict"),
        ((), {"text": [said("user", SLOT)]}, MessageError, "images: found 0; expected 1, one for each item 'image'"),
        ((), {"text": ASKED, "images": [WIDE_IMAGE]}, MessageError, "images: found 1; expected 0"),
        ((), {"text": [ASKED, ASKED], "images": [WIDE_IMAGE]}, MessageError, "images: found 1 entries; expected one"),
        ((), {"text": PROMPT}, MessageError, "found 1 <|image|> placeholder and 0 images"),
        ((), {"text": PROMPT, "images": "nowhere.png"}, MediaError, "nowhere.png"),
        ((), {"text": ASKED, "return_full_text": True, "return_tensors": True}, ConfigError,
         "return_full_text: found beside"),
        ((), {"text": ASKED, "return_type": "words"}, ConfigError, "return_type: found 'words'"),
        ((), {"text": ASKED, "batch_size": 0}, ConfigError, "batch_size: found 0"),
        ((), {"text": ASKED, "timeout": 1.0}, ConfigError, "timeout: found 1.0"),
        ((), {"text": ASKED, "device": "cuda"}, ConfigError, "device='cuda' is not supported"),
        ((), {"text": ASKED, "max_length": 9}, GenerationError, "max_length: found 9; expected it in generate_kwargs"),
        ((), {"text": ASKED, "max_new_tokens": 3, "generate_kwargs": {"max_new_tokens": 3}}, GenerationError,
         "max_new_tokens: found in generate_kwargs and beside it"),
        ((), {"text": ASKED, "generate_kwargs": 3}, GenerationError, "generate_kwargs: found 3; expected a dictionary"),
        ((), {"text": ASKED, "num_return_sequences": 2}, GenerationError, "num_return_sequences: found 2"),
        ((), {"text": ASKED, "generate_kwargs": {"generation_config": GenerationConfig(return_dict_in_generate=True)}},
         GenerationError, "return_dict_in_generate: found True; expected False: a pipeline returns one text"),
        ((), {"text": ASKED, "seed": "7"}, GenerationError, "seed: found '7'"),
        ((), {"text": ASKED, "top_kk": 7}, GenerationError, "unknown 'top_kk'"),
        ((), {"text": ASKED, "stop_sequence": ""}, GenerationError, "stop_sequence: found ''"),
        ((), {"text": (item for item in (PROMPT,)), "images": [WIDE_IMAGE]}, MessageError,
         "images: found some beside a generator"),
    ],
)  # fmt: skip
def test_what_cannot_be_answered_is_named(noted, args, kwargs, error, message):
    with pytest.raises(error) as caught:
        noted(*args, **kwargs)
    assert message in str(caught.value)
    assert not noted.model.calls


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("text-generation", "x"), "task: found 'text-generation'; expected 'image-text-to-text'"),
        ((), "model: expected a checkpoint directory, or a loaded model and its processor"),
    ],
)
def test_wrong_arguments_are_named(arguments, message):
    with pytest.raises(ConfigError, match=message):
        pipeline(*arguments)
