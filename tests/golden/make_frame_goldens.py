"""Makes `family/frames.json`: which frames the samplers of GLM-4.6V and GLM-GA take, from transformers 5.24.

    .venv-5x/bin/python tests/golden/make_frame_goldens.py

Of 19 chosen videos all indices are kept, of random ones their number and checksum.
"""

import json
import random
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import torch

# A torchvision wheel beside a torch of another build has no compiled operators, and wants two at import.
_LIBRARY = torch.library.Library("torchvision", "FRAGMENT")
for _name in ("nms", "qnms"):
    _LIBRARY.define(f"{_name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")

from transformers.models.glm46v.video_processing_glm46v import Glm46VVideoProcessor  # noqa: E402
from transformers.models.glmga.video_processing_glmga import GlmgaVideoProcessor  # noqa: E402
from transformers.video_utils import VideoMetadata  # noqa: E402

HERE = Path(__file__).parent / "family"
CHOSEN = [
    (12, 30, 0.4), (24, 30, 0.8), (60, 30, 2), (32, 8, 4), (300, 30, 10), (899, 29.97, None), (900, 30, 30),
    (930, 30, 31), (1440, 24, 60), (3600, 30, 120), (9000, 30, 300), (9030, 30, 301), (18000, 30, 600),
    (60000, 25, 2400), (90000, 25, 3600), (7, 1, 7), (5, 2, 2.5), (100, 10, None), (1, 1, 1),
]  # fmt: skip
RANDOM = 400


def random_clips() -> list[tuple[int, float, float | None, float | None]]:
    """Frames, frames a second, seconds or None, and the rate that GLM-GA is asked for or None."""
    draw = random.Random(18)
    clips: list[tuple[int, float, float | None, float | None]] = []
    for _ in range(RANDOM):
        rate = draw.choice(
            [0.5, 1, 5, 8, 10, 12.5, 23.976, 24, 25, 29.97, 30, 48, 59.94, 60, round(draw.uniform(1, 90), 3)]
        )
        seconds = round(10 ** draw.uniform(-1.5, 3.6), 3)
        total = max(1, round(seconds * rate * draw.choice([1, 1, 1, draw.uniform(0.3, 2)])))
        duration = draw.choice([None, total / rate, seconds, float(max(1, int(seconds)))])
        clips.append((total, rate, duration, draw.choice([None, None, 1, 4, 0.5, 7.3])))
    return clips


def taken(processor: Any, total: int, rate: float, duration: float | None, fps: float | None = None) -> list[int]:
    metadata = VideoMetadata(total_num_frames=total, fps=rate, duration=duration)
    return processor.sample_frames(metadata, fps=fps).tolist()


def brief(indices: list[int]) -> list[int]:
    return [len(indices), zlib.crc32(np.array(indices, "<i8").tobytes())]


def main() -> None:
    """Write the file."""
    by_length, capped = Glm46VVideoProcessor(), GlmgaVideoProcessor()
    chosen = [{"clip": clip, "glm46v": taken(by_length, *clip), "glmga": taken(capped, *clip)} for clip in CHOSEN]
    drawn = [
        {"clip": clip, "glm46v": brief(taken(by_length, *clip[:3])), "glmga": brief(taken(capped, *clip))}
        for clip in random_clips()
    ]
    HERE.mkdir(exist_ok=True)
    text = json.dumps({"chosen": chosen, "random": drawn}, separators=(",", ":"))
    (HERE / "frames.json").write_text(text.replace('{"clip"', '\n{"clip"') + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
