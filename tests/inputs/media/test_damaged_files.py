"""Every field of a checkpoint's files, with a value of another type in its place: an error of our own, or none."""

import contextlib
import itertools
import json
import shutil

import PIL.Image
import pytest

from glm4v_jax.config.generation import GenerationConfig
from glm4v_jax.config.model import Glm4vConfig
from glm4v_jax.errors import CheckpointError, Glm4vError
from glm4v_jax.inputs.processor import Glm4vProcessor
from glm4v_jax.inputs.processor_options import TEXT_OPTIONS
from glm4v_jax.tiny import TINY_CHECKPOINT

PICTURE = PIL.Image.new("RGB", (56, 28))
CONTENT = [
    {"type": "image", "image": PICTURE}, {"type": "video", "video": [PICTURE, PICTURE], "fps": 2},
    {"type": "text", "text": "a"},
]  # fmt: skip

WRONG = [None, "x", "3", 3, -1, 0, [], [1], {}, {"a": 1}, True, 1.5, 10**30, float("inf"), float("nan")]
BEYOND_FLOATS = 10**400

ROPE = ("rope_type", "mrope_section", "factor", "short_factor", "attention_factor", "truncate")
ABSENT = {
    "config.json": [
        ("quantization_config",), ("text_config", "rope_parameters"),
        ("text_config", "original_max_position_embeddings"),
        *(("text_config", "rope_scaling", name) for name in ROPE),
    ],
    "preprocessor_config.json": [("do_resize",), ("resample",), ("rescale_factor",), ("crop_size",)],
    "video_preprocessor_config.json": [("fps",), ("num_frames",), ("max_duration",), ("device",), ("return_tensors",)],
    "tokenizer_config.json": [
        ("chat_template",), ("chat_template", 0), ("extra_special_tokens",), ("extra_special_tokens", "a"),
        ("bos_token",), ("pad_token",), ("truncation_side",), ("added_tokens_decoder", "896", "lstrip"),
        *((name,) for name in sorted(TEXT_OPTIONS)),
    ],
}  # fmt: skip
"""Fields that a file could have."""
OF_ONE_KIND = {("model", "vocab"): None, ("added_tokens_decoder",): "896"}
"""Objects whose entries are alike: one of them, or none, stands for all."""


@pytest.fixture
def directory(tmp_path):
    shutil.copytree(TINY_CHECKPOINT, tmp_path / "damaged")
    return tmp_path / "damaged"


def paths(content, before=()):
    """The keys that lead to each field, fields of objects within objects included."""
    for key, value in content.items():
        if before in OF_ONE_KIND and key != OF_ONE_KIND[before]:
            continue
        yield (*before, key)
        if isinstance(value, dict):
            yield from paths(value, (*before, key))


def changed(content, path, value):
    """A copy in which `path` leads to `value`; what it passes through is made an object where it is none."""
    content = json.loads(json.dumps(content))
    place = content
    for key, following in itertools.pairwise(path):
        if isinstance(following, int):
            place[key] = [{"name": "default", "template": "t"}]
        elif not isinstance(place.get(key), dict):
            place[key] = {}
        place = place[key]
    place[path[-1]] = value
    return content


def use(directory, name):
    """Read the file, and use what it says; the message of the error if it cannot be read."""
    if name in ("config.json", "generation_config.json"):
        read = Glm4vConfig.from_pretrained if name == "config.json" else GenerationConfig.from_pretrained
    else:
        read = Glm4vProcessor.from_pretrained
    try:
        found = read(directory)
    except Glm4vError as error:
        return str(error)
    if isinstance(found, Glm4vProcessor):
        with contextlib.suppress(Glm4vError):
            found.apply_chat_template(
                [{"role": "user", "content": CONTENT}], add_generation_prompt=True, tokenize=True, return_dict=True
            )
    return None


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(path.name for path in TINY_CHECKPOINT.glob("*.json")))
@pytest.mark.filterwarnings("ignore")
def test_fields_of_other_types(directory, name):
    path = directory / name
    content = json.loads(path.read_text(encoding="utf-8"))
    values = [*WRONG, BEYOND_FLOATS]
    cases = list(itertools.product([*paths(content), *ABSENT.get(name, [])], values))
    refused = 0
    for field, value in cases:
        path.write_text(json.dumps(changed(content, field, value)), encoding="utf-8")
        try:
            message = use(directory, name)
        except Exception as error:
            raise AssertionError(f"{name}: {'.'.join(map(str, field))} = {value!r}") from error
        if message is not None:
            refused += 1
            assert name in message, (field, value)
    assert refused > len(cases) / 8


@pytest.mark.parametrize(
    ("name", "field", "value", "message"),
    [
        ("tokenizer_config.json", "model_max_length", "x", "model_max_length: found 'x'; expected a number"),
        ("tokenizer_config.json", "model_max_length", True, "model_max_length: found True"),
        ("tokenizer_config.json", "model_input_names", 3, "model_input_names: found 3; expected a list"),
        ("tokenizer_config.json", "model_input_names", "input_ids", "model_input_names: found 'input_ids'"),
        ("tokenizer_config.json", "added_tokens_decoder", [1], r"added_tokens_decoder: found \[1\]; expected {id"),
        ("tokenizer_config.json", "additional_special_tokens", "ab", "additional_special_tokens: found 'ab'; exp"),
        ("tokenizer_config.json", "extra_special_tokens", 3, "extra_special_tokens: found 3; expected "),
        ("tokenizer_config.json", "eos_token", {"content": "a", "lstrip": "x"}, "eos_token: .*'lstrip': 'x'"),
        ("tokenizer_config.json", "chat_template", ["a"], r"chat_template: found \['a'\]; expected a string"),
        ("tokenizer_config.json", "chat_template", 3, "chat_template: found 3; expected a string, or a list"),
        ("processor_config.json", "chat_template", [{"name": 1}], r"chat_template: found \[{'name': 1}\]; exp"),
        ("tokenizer_config.json", "chat_template", [{"name": "a", "template": "t"}, {}], "chat_template"),
        ("tokenizer_config.json", "added_tokens_decoder", {"x": "a"}, "added_tokens_decoder: expected {id: token}"),
        ("video_preprocessor_config.json", "fps", "2", "fps: found '2'; expected a number above 0"),
        ("preprocessor_config.json", "image_processor_type", ["a"], "image_processor_type: found"),
        ("video_preprocessor_config.json", "video_processor_type", {}, "video_processor_type: found {}; exp"),
        ("preprocessor_config.json", "size", {"shortest_edge": "1", "longest_edge": "2"}, "size.shortest_edge"),
        ("preprocessor_config.json", "patch_size", 10**30, "patch_size: found 10*; expected an integer from 1 to 4096"),
        ("preprocessor_config.json", "patch_size", True, "patch_size: found True; expected an integer"),
        ("preprocessor_config.json", "image_mean", ["0.5"], r"image_mean: found \['0.5'\]; expected a number"),
        ("preprocessor_config.json", "rescale_factor", "0.5", "rescale_factor: found '0.5'; expected a number"),
    ],
)
def test_the_file_and_the_field_are_named(directory, name, field, value, message):
    path = directory / name
    content = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    path.write_text(json.dumps(content | {field: value}), encoding="utf-8")
    if field == "chat_template":
        (directory / "chat_template.jinja").unlink()
    with pytest.raises(CheckpointError, match=rf"/{name}: .*{message}"):
        Glm4vProcessor.from_pretrained(directory)


def test_settings_that_are_not_an_object_are_named(directory):
    """The layout of 5.x: all settings in one file."""
    for name in ("preprocessor_config.json", "video_preprocessor_config.json"):
        (directory / name).unlink()
    (directory / "processor_config.json").write_text('{"image_processor": 3}', encoding="utf-8")
    with pytest.raises(CheckpointError, match=r"processor_config\.json: image_processor: found 3; expected an object"):
        Glm4vProcessor.from_pretrained(directory)


def test_a_map_of_special_tokens_that_is_not_a_list_is_named(directory):
    path = directory / "tokenizer_config.json"
    content = json.loads(path.read_text(encoding="utf-8"))
    del content["added_tokens_decoder"]
    path.write_text(json.dumps(content), encoding="utf-8")
    (directory / "special_tokens_map.json").write_text('{"additional_special_tokens": 3}', encoding="utf-8")
    with pytest.raises(CheckpointError, match=r"special_tokens_map\.json: additional_special_tokens: found 3"):
        Glm4vProcessor.from_pretrained(directory)
