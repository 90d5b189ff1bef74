"""The model and the data that `bench.train` measures with: both sides get the same weights and the same samples.

The data are a mix as people fine-tune on: short texts, pictures of many sizes and short videos, each a question and an
answer. Texts are pieces of this package's licence, pictures and videos are real ones.
"""

import json
import pathlib
import pickle
import shutil
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import PIL.Image

from bench import media, reference, report
from glm4v_jax.config.model import Glm4vConfig
from glm4v_jax.inputs.media.load import SampledVideo
from glm4v_jax.inputs.processor import Glm4vProcessor
from glm4v_jax.tiny import TINY_CHECKPOINT
from train.data.packing import Packer, VisionShape, pack, padding_of
from train.data.records import Record
from train.data.samples import EncodeOptions, Sample, encode

TEXT: dict[str, Any] = {
    "model_type": "glm4v_text", "vocab_size": 8192, "hidden_size": 512, "intermediate_size": 1712,
    "num_hidden_layers": 6, "num_attention_heads": 4, "num_key_value_heads": 2, "partial_rotary_factor": 0.5,
    "max_position_embeddings": 8192, "tie_word_embeddings": False,
    "rope_scaling": {"rope_type": "default", "mrope_section": [8, 12, 12]},
}  # fmt: skip
VISION: dict[str, Any] = {
    "model_type": "glm4v", "depth": 4, "hidden_size": 256, "num_heads": 2, "image_size": 336, "out_hidden_size": 512,
    "intermediate_size": 1712,
}  # fmt: skip
"""In the proportions of GLM-4.1V: heads of 128, MLPs of 3.3 times the width; wide for its depth."""

SHARES = {"text": 0.6, "picture": 0.3, "video": 0.1}
WORDS = (40, 0.8)
"""Of an answer: the median, and the standard deviation of its logarithm."""
SIDES = (84, 448)
"""Of pictures, in pixels."""


class Shape(NamedTuple):
    """Of packed batches: rows and tokens of each, and the same in vision rows and patches."""

    rows: int
    length: int
    vision: VisionShape


SHAPE = Shape(2, 1024, (1, 1216))
"""Vision rows as large as the data asks for on average."""
OPEN_BATCHES = 8
OPTIONS = EncodeOptions(max_length=SHAPE.length, too_long="drop", video_max_pixels=112 * 112 * 8)


def config() -> dict[str, Any]:
    """The model's config.json, with the token ids of the packaged tokenizer."""
    packaged = json.loads((TINY_CHECKPOINT / "config.json").read_text(encoding="utf-8"))
    ids = {name: value for name, value in packaged.items() if name.endswith("token_id")}
    return {
        "architectures": ["Glm4vForConditionalGeneration"], "model_type": "glm4v", "tie_word_embeddings": False, **ids,
        "text_config": TEXT, "vision_config": VISION,
    }  # fmt: skip


def write_checkpoint(directory: pathlib.Path, content: dict[str, Any]) -> None:
    """Write random float32 weights in Hugging Face layout, with the packaged processor."""
    from bench import cpu_model

    cpu_model.write_checkpoint(directory, content)
    for file in reference.PROCESSOR_FILES:
        shutil.copyfile(TINY_CHECKPOINT / file, directory / file)


def make_samples(directory: pathlib.Path, count: int, seed: int = 0) -> list[Sample]:
    """So many samples, the same for the same arguments."""
    processor = Glm4vProcessor.from_pretrained(directory)
    model_config = Glm4vConfig.from_pretrained(directory)
    made = [encode(record, processor, model_config, OPTIONS) for record in _records(count, seed)]
    return [sample for sample in made if sample is not None]


def packed(samples: Sequence[Sample], shape: Shape) -> list[list[Sample]]:
    """The full batches that a job makes of a stream; what is still open behind its last sample is left out."""
    packer = Packer(rows=shape.rows, length=shape.length, vision_shape=shape.vision, open_batches=OPEN_BATCHES)
    done = (packer.push(sample) for sample in samples)
    return [batch for batch in done if batch is not None]


def padding(batches: Sequence[Sequence[Sample]], shape: Shape, content: dict[str, Any]) -> dict[str, float]:
    """Shares of packed batches that are padding: of their tokens, and of their patches."""
    model_config = Glm4vConfig.from_dict(content)
    shares = [
        padding_of(pack(batch, rows=shape.rows, length=shape.length, vision_shape=shape.vision, config=model_config))
        for batch in batches
    ]
    return {
        "tokens": float(np.mean([share.tokens for share in shares])),
        "patches": float(np.mean([share.patches or 0.0 for share in shares])),
    }


def padded_share(batches: Sequence[Sequence[Sample]]) -> float:
    """The share of padding among the tokens where each batch is padded to its longest sample."""
    places = sum(len(batch) * max(map(len, batch)) for batch in batches)
    return 1 - sum(map(len, (sample for batch in batches for sample in batch))) / places


def grouped(batches: Sequence[Sequence[Sample]]) -> list[list[Sample]]:
    """The same samples in as many batches, samples of a length together; `group_by_length` does that at its best."""
    samples = sorted((sample for batch in batches for sample in batch), key=len, reverse=True)
    parts = np.array_split(np.arange(len(samples)), len(batches))
    return [[samples[i] for i in part] for part in parts]


def write_batches(path: pathlib.Path, ways: dict[str, list[list[Sample]]]) -> None:
    """For `read_batches` of another process."""
    path.write_bytes(pickle.dumps(ways))


def read_batches(path: pathlib.Path | str) -> dict[str, list[list[Sample]]]:
    """What `write_batches` has written: way to train -> batches of samples."""
    return pickle.loads(pathlib.Path(path).read_bytes())


def _records(count: int, seed: int) -> list[Record]:
    random = np.random.default_rng(seed)
    words = (report.ROOT / "LICENSE").read_text(encoding="utf-8").split()
    pictures = [PIL.Image.open(media.photograph(name)).convert("RGB") for name in media.PHOTOGRAPHS]
    frames = [_frames(media.video(name)) for name in media.VIDEOS[:2]]
    made = []
    for number in range(count):
        kind = random.choice(list(SHARES), p=list(SHARES.values()))
        content: list[dict[str, Any]] = []
        if kind == "picture":
            picture = pictures[random.integers(len(pictures))]
            sides = random.integers(SIDES[0], SIDES[1] + 1, 2)
            content = [{"type": "image", "image": picture.resize((int(sides[0]), int(sides[1])))}]
        elif kind == "video":
            film = frames[random.integers(len(frames))]
            start = random.integers(len(film) - 16)
            content = [{"type": "video", "video": SampledVideo(film[start : start + 16 : 2], 4.0)}]
        question = {"type": "text", "text": _piece(random, words, 12)}
        answer = {"type": "text", "text": _piece(random, words, int(WORDS[0] * np.exp(WORDS[1] * random.normal())))}
        messages = ({"role": "user", "content": [*content, question]}, {"role": "assistant", "content": [answer]})
        made.append(Record(messages, (False, True), f"sample {number}"))
    return made


def _piece(random: np.random.Generator, words: Sequence[str], count: int) -> str:
    count = min(max(count, 1), 250)
    start = int(random.integers(len(words) - count))
    return " ".join(words[start : start + count])


def _frames(path: pathlib.Path) -> np.ndarray:
    """uint8 [T, H, W, 3], a video's first 60 frames."""
    from glm4v_jax.inputs.media.decode import decode_video

    frames, _ = decode_video(path, path.name, lambda metadata, **_: np.arange(60), max_pixels=1 << 22)
    return frames
