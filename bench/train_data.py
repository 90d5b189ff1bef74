"""The data that `bench.train` measures with: both sides get the same samples.

They are a mix as people fine-tune on: short texts, images of many sizes and short videos, each a question and an
answer. Texts are excerpts of this package's licence; images and videos are real ones.
"""

import pathlib
import pickle
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import PIL.Image

from bench import media, report
from glm4v_jax.config.model import Glm4vConfig
from glm4v_jax.inputs.media.load import SampledVideo
from glm4v_jax.inputs.processor import Glm4vProcessor
from train.data.packing import Packer, VisionShape, pack, padding_of
from train.data.records import Record
from train.data.samples import EncodeOptions, Sample, encode

FRACTIONS = {"text": 0.6, "image": 0.3, "video": 0.1}
WORDS = (40, 0.8)
"""Of an answer: the median, and the standard deviation of its logarithm."""
SIDES = (84, 448)
"""Of images, in pixels."""


class Shape(NamedTuple):
    """Of packed batches: rows and tokens of each, and the same in vision rows and patches."""

    rows: int
    length: int
    vision: VisionShape


SHAPE = Shape(2, 1024, (1, 1216))
"""Vision rows as large as the data asks for on average."""
OPEN_BATCHES = 8
OPTIONS = EncodeOptions(max_length=SHAPE.length, too_long="drop", video_max_pixels=112 * 112 * 8)


def make_samples(directory: pathlib.Path, count: int) -> list[Sample]:
    """Make samples, the same for the same arguments."""
    processor = Glm4vProcessor.from_pretrained(directory)
    model_config = Glm4vConfig.from_pretrained(directory)
    made = [encode(record, processor, model_config, OPTIONS) for record in _records(count)]
    return [sample for sample in made if sample is not None]


def packed(samples: Sequence[Sample], shape: Shape) -> list[list[Sample]]:
    """The full batches that a job makes of a stream; batches that are still open after its last sample are dropped."""
    packer: Packer[Sample] = Packer(
        rows=shape.rows, length=shape.length, vision_shape=shape.vision, open_batches=OPEN_BATCHES
    )
    done = (packer.push(sample) for sample in samples)
    return [batch for batch in done if batch is not None]


def padding(batches: Sequence[Sequence[Sample]], shape: Shape, content: dict[str, Any]) -> dict[str, float]:
    """Fractions of packed batches that are padding: of their tokens, and of their patches."""
    model_config = Glm4vConfig.from_dict(content)
    shares = [
        padding_of(pack(batch, rows=shape.rows, length=shape.length, vision_shape=shape.vision, config=model_config))
        for batch in batches
    ]
    return {
        "tokens": float(np.mean([share.tokens for share in shares])),
        "patches": float(np.mean([share.patches or 0.0 for share in shares])),
    }


def padded_fraction(batches: Sequence[Sequence[Sample]]) -> float:
    """The fraction of padding among the tokens where each batch is padded to its longest sample."""
    positions = sum(len(batch) * max(map(len, batch)) for batch in batches)
    return 1 - sum(len(sample) for batch in batches for sample in batch) / positions


def grouped(batches: Sequence[Sequence[Sample]]) -> list[list[Sample]]:
    """The same samples in as many batches, sorted by length: the best that `group_by_length` can do."""
    samples = sorted((sample for batch in batches for sample in batch), key=len, reverse=True)
    parts = np.array_split(np.arange(len(samples)), len(batches))
    return [[samples[i] for i in part] for part in parts]


def write_batches(path: pathlib.Path, ways: dict[str, list[list[Sample]]]) -> None:
    """For `read_batches` of another process."""
    path.write_bytes(pickle.dumps(ways))


def read_batches(path: pathlib.Path | str) -> dict[str, list[list[Sample]]]:
    """What `write_batches` has written: way to train -> batches of samples."""
    return pickle.loads(pathlib.Path(path).read_bytes())


def _records(count: int) -> list[Record]:
    random = np.random.default_rng(0)
    words = (report.ROOT / "LICENSE").read_text(encoding="utf-8").split()
    images = [PIL.Image.open(media.photograph(name)).convert("RGB") for name in media.PHOTOGRAPHS]
    videos = [_frames(media.video(name)) for name in media.VIDEOS[:2]]
    made = []
    for number in range(count):
        kind = random.choice(list(FRACTIONS), p=list(FRACTIONS.values()))
        content: list[dict[str, Any]] = []
        if kind == "image":
            image = images[random.integers(len(images))]
            sides = random.integers(SIDES[0], SIDES[1] + 1, 2)
            content = [{"type": "image", "image": image.resize((int(sides[0]), int(sides[1])))}]
        elif kind == "video":
            video = videos[random.integers(len(videos))]
            start = random.integers(len(video) - 16)
            content = [{"type": "video", "video": SampledVideo(video[start : start + 16 : 2], 4.0)}]
        question = {"type": "text", "text": _excerpt(random, words, 12)}
        answer = {"type": "text", "text": _excerpt(random, words, int(WORDS[0] * np.exp(WORDS[1] * random.normal())))}
        messages = ({"role": "user", "content": [*content, question]}, {"role": "assistant", "content": [answer]})
        made.append(Record(messages, (False, True), f"sample {number}"))
    return made


def _excerpt(random: np.random.Generator, words: Sequence[str], count: int) -> str:
    count = min(max(count, 1), 250)
    start = int(random.integers(len(words) - count))
    return " ".join(words[start : start + count])


def _frames(path: pathlib.Path) -> np.ndarray:
    """uint8 [T, H, W, 3], a video's first 60 frames."""
    from glm4v_jax.inputs.media.decode import decode_video

    frames, _ = decode_video(path, path.name, lambda metadata, **_: np.arange(60), max_pixels=1 << 22)
    return frames
