"""Makes `family/frames.json`: which frames of random videos the samplers of transformers 5.24 take.

    make family-goldens

Their number and checksum are kept; of the chosen videos in `family/sample_frames_5.24.json` all indices are.
"""

import json
import random
import zlib
from pathlib import Path
from typing import Any

import numpy as np
from helpers_transformers import define_torchvision_operators

define_torchvision_operators()

from transformers.models.glm46v.video_processing_glm46v import Glm46VVideoProcessor  # noqa: E402
from transformers.models.glmga.video_processing_glmga import GlmgaVideoProcessor  # noqa: E402
from transformers.video_utils import VideoMetadata  # noqa: E402

HERE = Path(__file__).parent / "family"
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
    rows = [
        {"clip": clip, "glm46v": brief(taken(by_length, *clip[:3])), "glmga": brief(taken(capped, *clip))}
        for clip in random_clips()
    ]
    HERE.mkdir(exist_ok=True)
    lines = ",\n".join(json.dumps(row, separators=(",", ":")) for row in rows)
    (HERE / "frames.json").write_text(f"[\n{lines}\n]\n", encoding="utf-8")


if __name__ == "__main__":
    main()
