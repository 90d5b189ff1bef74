"""Work of the host for `bench.growth`, at any size: each function prepares it and returns what is to be timed.

Work that returns a number has measured something itself.
"""

import functools
import json
import pathlib
import sys
import tempfile
import tracemalloc
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from bench import models
from bench.turns import peak_bytes, printed_by
from glm4v_jax.checkpoints.hf_write import save_pretrained
from glm4v_jax.checkpoints.load import load_runtime
from glm4v_jax.config.generation import GenerationConfig
from glm4v_jax.config.model import Glm4vConfig
from glm4v_jax.data.tables import open_rows
from glm4v_jax.generate.engine import Engine
from glm4v_jax.generate.sequence import SequenceState
from glm4v_jax.inputs.make_batch import make_batch
from glm4v_jax.inputs.media.load import SampledVideo
from glm4v_jax.inputs.processor import Glm4vProcessor
from glm4v_jax.inputs.prompt import Prompt, prompts_of
from glm4v_jax.inputs.vision_rows import choose_shape
from glm4v_jax.tiny import TINY_CHECKPOINT
from train.data.epochs import Size
from train.data.packing import Packer
from train.data.records import Record, read_records
from train.data.samples import EncodeOptions, encode

Work = Callable[[], Any]

SIDE = 56
"""Of images and frames, in pixels: 16 patches."""
SENTENCE = "The little brown dog sits on the green grass. "
DIRECTORY = tempfile.TemporaryDirectory(prefix="growth-")
"""Of files that the work reads."""


@functools.cache
def processor() -> Glm4vProcessor:
    """The packaged one."""
    return Glm4vProcessor.from_pretrained(TINY_CHECKPOINT)


@functools.cache
def config() -> Glm4vConfig:
    """Of the packaged model."""
    return Glm4vConfig.from_pretrained(TINY_CHECKPOINT)


def _encoded(messages: Sequence[Any]) -> Any:
    return processor().apply_chat_template(messages, tokenize=True, return_dict=True)


def _asked(*media: Any) -> list[Any]:
    return [{"role": "user", "content": [*media, {"type": "text", "text": "What is it?"}]}]


def _pixels(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (*shape, SIDE, SIDE, 3), np.uint8)


def _images(count: int) -> list[Any]:
    return _asked(*({"type": "image", "image": image} for image in _pixels(count)))


def read_images(count: int) -> Work:
    """Messages with images to tokens and patches."""
    messages = _images(count)
    return lambda: _encoded(messages)


def batch_images(count: int) -> Work:
    """A prompt with images to a batch: positions, rows of patches, where vision tokens go."""
    inputs = {name: value for name, value in _encoded(_images(count)).items() if name != "token_type_ids"}
    return lambda: make_batch(config=config(), **inputs)


def compare_images(count: int) -> Work:
    """What two prompts with the same images have in common."""
    one, other = (prompts_of(_encoded(_images(count)), config())[0] for _ in range(2))
    return lambda: one.common_prefix(other)


def read_frames(count: int) -> Work:
    """A video of sampled frames to tokens and patches."""
    messages = _asked({"type": "video", "video": SampledVideo(_pixels(count), 4.0)})
    return lambda: _encoded(messages)


def place_frames(count: int) -> Work:
    """The shape of the rows that hold frames of many sizes."""
    sizes = np.random.default_rng(0).integers(500, 6000, count).tolist()
    return lambda: choose_shape(sizes)


def _conversation(turns: int) -> list[Any]:
    roles = ("user", "assistant")
    return [
        {"role": roles[i % 2], "content": [{"type": "text", "text": 3 * SENTENCE.strip()}]} for i in range(2 * turns)
    ]


def read_turns(turns: int) -> Work:
    """A conversation to tokens."""
    messages = _conversation(turns)
    return lambda: _encoded(messages)


def encode_turns(turns: int) -> Work:
    """A conversation to a training sample that learns from each of its answers."""
    record = Record(tuple(_conversation(turns)), tuple(i % 2 == 1 for i in range(2 * turns)), "record")
    return lambda: encode(record, processor(), config(), EncodeOptions(max_length=None))


def read_text(tokens: int) -> Work:
    """A long text to tokens."""
    sentence = len(processor().tokenizer.encode(SENTENCE))
    messages = _asked({"type": "text", "text": SENTENCE * (tokens // sentence)})
    return lambda: _encoded(messages)


def take_tokens(tokens: int, **options: Any) -> Work:
    """An answer that comes eight tokens at a time: text, thoughts, the end."""
    # In random order, or it would end where it repeats itself.
    ids = np.random.default_rng(0).choice(processor().tokenizer.encode(SENTENCE), tokens).tolist()
    asked, prompt = GenerationConfig(max_new_tokens=tokens + 1, **options), Prompt.of_text([1, 2, 3])

    def work() -> None:
        sequence = SequenceState(prompt, asked, processor().tokenizer, 2 * tokens)
        sequence.start()
        for begin in range(0, tokens, 8):
            sequence.take(ids[begin : begin + 8], False)
        sequence.completion()

    return work


def take_with_stops(tokens: int) -> Work:
    """The same with stop strings and an end where the text repeats itself, token by token."""
    return take_tokens(tokens, stop_strings=("###", "<end>"), stop_repetition=True)


def _rows(count: int) -> pathlib.Path:
    path = pathlib.Path(DIRECTORY.name, f"{count}.jsonl")
    turns = ({"role": role, "content": SENTENCE} for role in ("user", "assistant"))
    path.write_text((json.dumps({"messages": list(turns)}) + "\n") * count, encoding="utf-8")
    return path


def open_lines(count: int) -> Work:
    """The lines of a file of JSON lines."""
    path = _rows(count)
    return lambda: open_rows(path)


def read_lines(count: int) -> Work:
    """All records of such a file."""
    records = read_records(_rows(count))
    return lambda: [records[number] for number in range(len(records))]


def hold_lines(count: int) -> Work:
    """Bytes that the opened file takes."""
    path = _rows(count)

    def work() -> int:
        tracemalloc.start()
        rows = open_rows(path)
        held = tracemalloc.get_traced_memory()[0]
        tracemalloc.stop()
        assert len(rows) == count
        return held

    return work


def _packing(samples: int, rows: int) -> Work:
    random = np.random.default_rng(0)
    sizes = [Size(int(random.integers(50, 400)), np.full((int(random.integers(0, 3)), 2), 8)) for _ in range(samples)]
    shape: dict[str, Any] = dict(rows=rows, length=1024, vision_shape=(rows, 512), open_batches=4)
    return lambda: list(Packer[Size](**shape).batches(sizes))


def pack_samples(samples: int) -> Work:
    """Samples to batches of eight rows."""
    return _packing(samples, 8)


def pack_into_rows(rows: int) -> Work:
    """Pack 4,000 samples into batches of `rows` rows."""
    return _packing(4000, rows)


@functools.cache
def _engine() -> Engine:
    return Engine.from_pretrained(TINY_CHECKPOINT, num_slots=8)


def answer_requests(count: int) -> Work:
    """Requests of the packaged model, eight at a time, four tokens each."""
    prompts = [_engine().prompt("What is it?")] * count
    return lambda: list(_engine().generate_many(prompts, max_new_tokens=4, do_sample=False, eos_token_id=-1))


MEGABYTES_A_LAYER = 4


@functools.cache
def _checkpoint(megabytes: int) -> pathlib.Path:
    """Write a checkpoint of about `megabytes`, nearly all of them in layers of `MEGABYTES_A_LAYER`."""
    text = dict(
        num_hidden_layers=max(megabytes // MEGABYTES_A_LAYER, 1), hidden_size=256, intermediate_size=1024,
        num_attention_heads=2, num_key_value_heads=1,
    )  # fmt: skip
    content = json.loads(json.dumps(models.TRAINING))
    content["text_config"] |= text
    content["vision_config"] |= dict(depth=1, hidden_size=64, out_hidden_size=256, intermediate_size=64, num_heads=1)
    return models.write_checkpoint(pathlib.Path(DIRECTORY.name, f"{megabytes}MB"), content)


def load_checkpoint(megabytes: int) -> Work:
    """Weights from safetensors to the device."""
    path = _checkpoint(megabytes)
    return lambda: load_runtime(path, dtype="float32", stacked=False)


def save_checkpoint(megabytes: int) -> Work:
    """Weights from the device to safetensors."""
    module = load_runtime(_checkpoint(megabytes), dtype="float32", stacked=False).module
    target = pathlib.Path(DIRECTORY.name, f"{megabytes}MB-saved")
    return lambda: save_pretrained(module, GenerationConfig(), target)


def peak_of_load(megabytes: int) -> Work:
    """Peak bytes of a process that loads weights, beyond those of one that loads a single layer."""
    paths = [str(_checkpoint(MEGABYTES_A_LAYER)), str(_checkpoint(megabytes))]

    def work() -> int:
        least, peak = (int(printed_by("bench.growth_host", path, JAX_PLATFORMS="cpu")) for path in paths)
        return peak - least

    return work


if __name__ == "__main__":
    loaded = load_runtime(sys.argv[1], dtype="float32", stacked=False)
    print(peak_bytes())
