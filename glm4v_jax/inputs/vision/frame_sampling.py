"""Which frames of a video are taken: the samplers of the family, index for index those of transformers.

That of GLM-4.1V is `Glm4vVideoProcessor.sample_frames` of 4.57.1; the others are those of `Glm46VVideoProcessor` and
`GlmgaVideoProcessor` of 5.24. Where the reference takes no frame of a very short clip, these take the first.
"""

import bisect
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

# Half a tick of a clock of milliseconds, to which containers round the times of frames.
_CLOCK_SECONDS = 0.0005

# Of GLM-4.6V: (longest duration in seconds, pairs of frames a second up to it); longer ones count as the longest.
_RATES_BY_SECONDS = ((30, 3.0), (300, 1.0), (2400, 0.5))
_MOST_FRAMES_BY_LENGTH = 640


class Clip(NamedTuple):
    """A whole video: its frames, frames a second and seconds, all positive, and times of frames where `rate` lies."""

    total: int
    rate: float
    duration: float
    frame_times: Sequence[float] | None = None

    def first_from(self, seconds: float, start: int = 0) -> int:
        """The first frame at or after a time, from the frame `start` on; `total` where there is none."""
        if self.frame_times is not None:
            return bisect.bisect_left(self.frame_times, seconds - _CLOCK_SECONDS, min(start, self.total), self.total)
        # As the reference computes times here: a product, which may round to another number than i / rate.
        of_one = 1 / self.rate
        return bisect.bisect_left(range(self.total), seconds, min(start, self.total), key=lambda i: i * of_one)

    def spread(self, first: int, last: int, count: int) -> list[int]:
        """As many frames, evenly from one to another: in number, as the reference has it, or where known in time."""
        if self.frame_times is None:
            return np.linspace(first, last, count, dtype=int).tolist()
        seconds = np.linspace(self.frame_times[first], self.frame_times[last], count)
        return [bisect.bisect_right(self.frame_times, at + _CLOCK_SECONDS, first, last + 1) - 1 for at in seconds]


def _by_rate(clip: Clip, *, fps: float, max_duration: float) -> list[int]:
    """GLM-4.1V's: `fps` frames a second; of longer videos `max_duration * fps`, spread over their whole length."""
    last = clip.total - 1

    def frame_at(seconds: float, position: float) -> int:
        """The first frame from a time on; `position` is the time in frames of a constant rate."""
        return min(last, math.ceil(position) if clip.frame_times is None else clip.first_from(seconds))

    if clip.duration <= max_duration:
        count = math.floor(clip.duration * fps)
        return [frame_at(i / fps, i * clip.rate / fps) for i in range(count)]
    count = int(max_duration * fps)
    if count >= clip.total:
        return list(range(clip.total))
    return [frame_at(t, t * clip.rate) for t in np.linspace(0, clip.duration, count, endpoint=True)]


def _by_length(clip: Clip, *, temporal_patch_size: int) -> list[int]:
    """GLM-4.6V's: the longer the video, the fewer frames a second; no option changes that."""
    longest = _RATES_BY_SECONDS[-1][0]
    seconds = min(clip.duration, longest)
    rate = next(rate for most, rate in _RATES_BY_SECONDS if seconds <= most)
    count = min(int(seconds * rate * temporal_patch_size), _MOST_FRAMES_BY_LENGTH)
    if clip.total < count:
        return np.linspace(0, clip.total - 1, count, dtype=int).tolist()
    taken = _every(clip, 1 / (temporal_patch_size * rate), stop=int(clip.duration), most=count)
    return _fitted(clip, taken, count)


def _by_capped_rate(clip: Clip, *, fps: float, max_frames: int) -> list[int]:
    """GLM-GA's: `fps` frames a second, but at most `max_frames`, spread over the whole length."""
    count = int(min(clip.duration * fps, max_frames))
    if clip.total < count:
        return [i * clip.total // count for i in range(count)]
    taken = _every(clip, 1 / fps, stop=clip.duration - 1 / fps, most=count)
    return _fitted(clip, taken, count)


def _every(clip: Clip, interval: float, stop: float, most: int) -> list[int]:
    """The first frame of every interval, up to a time of `stop` seconds, or until there are more than `most`."""
    taken: list[int] = []
    seconds = 0.0
    while len(taken) <= most:
        frame = clip.first_from(seconds, taken[-1] + 1 if taken else 0)
        if frame == clip.total:
            break
        taken.append(frame)
        seconds += interval
        if seconds >= stop:
            break
    return taken


def _fitted(clip: Clip, taken: list[int], count: int) -> list[int]:
    """As many frames as wanted: those taken, or as many evenly spread over them or, of too many, over the video."""
    if len(taken) < count:
        return clip.spread(taken[0], taken[-1], count)
    return taken if len(taken) == count else clip.spread(0, clip.total - 1, count)


class Sampler(NamedTuple):
    """A rule, and the settings of the video processor that it obeys."""

    take: Callable[..., list[int]]
    settings: tuple[str, ...]


SAMPLERS: Mapping[str, Sampler] = {
    "rate": Sampler(_by_rate, ("fps", "max_duration")),
    "length": Sampler(_by_length, ("temporal_patch_size",)),
    "capped_rate": Sampler(_by_capped_rate, ("fps", "max_frames")),
}


def take_frames(sampler: Sampler, clip: Clip, settings: Mapping[str, Any]) -> np.ndarray:
    """Choose the frames to take of a video.

    >>> take_frames(SAMPLERS["length"], Clip(60, 30, 2), {"temporal_patch_size": 2}).tolist()
    [0, 5, 10, 15, 20, 25, 30, 35, 40, 45, 50, 56]
    >>> take_frames(SAMPLERS["capped_rate"], Clip(12, 30, 0.4), {"fps": 2, "max_frames": 640}).tolist()
    [0, 0]

    Args:
        sampler: the rule.
        clip: the whole video.
        settings: the values of those that the sampler obeys.

    Returns:
        Ascending indices [T] int64, each once, T even and at least 2: the last is repeated where needed.
    """
    taken = list(dict.fromkeys(sampler.take(clip, **settings))) or [0]
    return np.array(taken + taken[-1:] * (len(taken) % 2), dtype=np.int64)
