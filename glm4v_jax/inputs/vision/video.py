"""Videos to patches: `Glm4vVideoProcessor` of transformers 4.57.1, with the repairs of 5.x, and its siblings' of 5.24.

The numbers are the reference's bit for bit for frames of bytes; see `pixels` for other types. The repairs: a clip too
short for one sample keeps its first frame; padding is right for `temporal_patch_size > 2`; metadata is counted against
the videos. On top, frames are converted to RGB as documented, where the reference fails.
"""

import math
import warnings
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar

import numpy as np
import PIL.Image
from msgspec import Meta

from glm4v_jax.config.checks import Positive, PositiveNumber, checked
from glm4v_jax.errors import MediaError
from glm4v_jax.inputs.batch_feature import BatchFeature
from glm4v_jax.inputs.media.array_layout import LAST, NONE, channel_format, to_channels_last
from glm4v_jax.inputs.media.load import (
    SampledVideo,
    VideoLimits,
    VideoMetadata,
    are_frames,
    frame_files,
    is_array,
    is_path_like,
    load_video,
    naming_media,
)
from glm4v_jax.inputs.media.threads import map_threads
from glm4v_jax.inputs.vision.frame_sampling import SAMPLERS, Clip, take_frames
from glm4v_jax.inputs.vision.patches import cut_patches, normalization_of, resize_planes
from glm4v_jax.inputs.vision.settings import GENERAL_DEFAULTS, MediaProcessor, MediaWithOptions, area_of, check_sides

# How often, and how long: whether they make sense is judged where frames are sampled.
_Number = Annotated[float, Meta(extra={"finite": False})]
_METADATA: Mapping[str, Any] = {
    "total_num_frames": int | None,
    "fps": _Number | None,
    "duration": _Number | None,
    "frame_times": tuple[float, ...] | None,
}
# What a call may say about which frames are taken.
_SAMPLING_OPTIONS = ("fps", "max_duration", "max_frames")


def _is_frame(value: Any) -> bool:
    return isinstance(value, PIL.Image.Image) or (is_array(value) and value.ndim in (2, 3))


def flatten_videos(videos: Any) -> list[Any]:
    """One video, a batch of them, or nested lists of either -> a flat list of videos for `load_video`.

    A list of frames (Pillow images, arrays of up to three axes, files of single images) is one video. Other paths and
    addresses are one video each, except two lists deep and more, `[[["0", "1"]]]`, where the innermost list is the
    frames of one, as in the reference.

    Raises:
        MediaError: something that is not a video.
    """
    return _flatten_videos(videos, depth=0)


def _flatten_videos(videos: Any, depth: int) -> list[Any]:
    if isinstance(videos, (SampledVideo, MediaWithOptions)) or is_path_like(videos) or _is_frame(videos):
        return [videos]
    if is_array(videos):
        if videos.ndim == 4:
            return [videos]
        if videos.ndim == 5:
            return list(np.asarray(videos))
        raise MediaError(f"Invalid video input: an array of shape {videos.shape}; expected 3, 4 or 5 axes")
    if isinstance(videos, (list, tuple)):
        if videos and all(_is_frame(item) for item in videos):
            return [list(videos)]
        if are_frames(videos) or (depth >= 2 and videos and all(map(is_path_like, videos))):
            return [list(videos)]
        return [video for item in videos for video in _flatten_videos(item, depth + 1)]
    raise MediaError(
        f"Invalid video input: {type(videos).__name__}; expected a path, an address, bytes, frames, or lists of these"
    )


def flatten_metadata(video_metadata: Any, num_videos: int) -> list[VideoMetadata | None]:
    """One metadata object a video, from one object, a list or nested lists of `VideoMetadata`, dictionaries and None.

    A dictionary need not have `total_num_frames`: it is None in the result then, and the number of frames given counts.

    Raises:
        MediaError: unknown fields, one that is no number, or not one object a video.
    """
    if video_metadata is None:
        return [None] * num_videos
    flat: list[VideoMetadata | None] = []

    def collect(item: Any) -> None:
        if isinstance(item, (list, tuple)):
            for inner in item:
                collect(inner)
        elif item is None:
            flat.append(None)
        else:
            where = f"video_metadata {len(flat)}: "
            try:
                known = VideoMetadata(**{"total_num_frames": None, **item})
            except TypeError as error:
                raise MediaError(f"{where}{error}; see VideoMetadata") from error
            for name, hint in _METADATA.items():
                checked(f"{where}{name}", getattr(known, name), hint, MediaError)
            flat.append(known)

    collect(video_metadata)
    if len(flat) != num_videos:
        raise MediaError(f"video_metadata has {len(flat)} entries for {num_videos} videos; expected one each")
    return flat


def blend_on_white(frames: np.ndarray) -> np.ndarray:
    """Convert frames to RGB as the reference's `BaseVideoProcessor.convert_to_rgb`.

    Args:
        frames: [T, H, W, C].

    Returns:
        [T, H, W, 3]: one channel is repeated, a fourth is taken as alpha (0..255) over white, others stay as they are.
    """
    channels = frames.shape[-1]
    if channels == 1:
        return np.repeat(frames, 3, axis=-1)
    if channels != 4:
        return frames
    if frames[..., 3].min() == 255:
        return frames[..., :3]
    alpha = frames[..., 3:].astype(np.float32) / np.float32(255)
    return (1 - alpha) * 255 + alpha * frames[..., :3]


def _whole_clip(metadata: VideoMetadata | None) -> Clip:
    """What a sampler needs of a whole video; MediaError if the metadata lacks the frame rate, or is nonsense."""
    if metadata is None or metadata.fps is None:
        raise MediaError(
            "Asked to sample frames per second but no video metadata was provided which is required when sampling "
            "in GLM4V. Please pass in `VideoMetadata` object or set `do_sample_frames=False`: for frames in a list "
            "or an array, video_metadata=VideoMetadata(total_num_frames=..., fps=...), with VideoMetadata from "
            "glm4v_jax, says how fast they were taken"
        )
    total, rate = metadata.total_num_frames, metadata.fps
    if total is None or total < 1 or not (math.isfinite(rate) and rate > 0):
        raise MediaError(f"video_metadata has {total} frames at {rate} a second; expected both to be positive")
    duration = metadata.duration or round((total - 1) / rate) + 1
    if not (math.isfinite(duration) and duration > 0):
        raise MediaError(f"video_metadata has a duration of {duration} seconds; expected a positive number")
    return Clip(total, rate, duration, metadata.frame_times)


class Glm4vVideoProcessor(MediaProcessor):
    """Sample, resize, normalise and cut videos into patches.

    >>> frames = np.zeros((8, 56, 84, 3), np.uint8)
    >>> inputs = Glm4vVideoProcessor()(frames, video_metadata={"fps": 4})
    >>> inputs.pixel_values_videos.shape, inputs.video_grid_thw.tolist()
    ((72, 1176), [[3, 4, 6]])

    Its arguments are settings, those of `MediaProcessor` and:

    Attributes:
        do_sample_frames: whether to take some frames, as the member's sampler does (`frame_sampling`), or all.
        fps: frames to take from a second; GLM-4.6V-Flash and GLM-OCR go by the length of a video alone.
        max_duration: seconds; longer videos of GLM-4.1V get `max_duration * fps` frames over their whole length.
        max_frames: frames of GLM-GA at most.
        num_frames: kept for its name; no sampler goes by it, in the reference as here.
        video_metadata: default of the argument of `preprocess`.
        return_metadata: whether results hold `video_metadata`.
        input_data_format: "channels_first", "channels_last", "none" for grey [T, H, W], or None to guess.
        limits, max_tokens: what an encoded video may be at most, before it is decoded, for videos of strangers;
            attributes and no settings.
        do_center_crop: no effect on GLM-4.1V, like `crop_size`, `size_divisor`, `default_to_square`.
    """

    model_input_names: ClassVar[list[str]] = ["pixel_values_videos", "video_grid_thw"]
    config_files = ("video_preprocessor_config.json", "preprocessor_config.json")
    nested_key = "video_processor"
    type_key = "video_processor_type"
    defaults: Mapping[str, Any] = {
        **MediaProcessor.defaults,
        **GENERAL_DEFAULTS,
        "size": {"shortest_edge": 112 * 112, "longest_edge": 28 * 28 * 2 * 30000},
        "do_sample_frames": True,
        "num_frames": 16,
        "fps": 2,
        "max_duration": 300,
        "video_metadata": None,
        "return_metadata": False,
        "size_divisor": None,
    }
    is_general = True

    constraints: ClassVar[Mapping[str, Any]] = {
        **MediaProcessor.constraints,
        "fps": PositiveNumber,
        "max_duration": PositiveNumber,
        "max_frames": Positive,
    }

    do_sample_frames: bool
    num_frames: int
    fps: float
    max_duration: float
    limits: VideoLimits = VideoLimits()
    max_tokens: int | None = None

    def sample_frames(
        self,
        metadata: VideoMetadata,
        fps: float | None = None,
        max_duration: float | None = None,
        max_frames: int | None = None,
        **kwargs: Any,
    ) -> np.ndarray:
        """Choose the frames to take: pixels and timestamps both follow these indices.

        Args:
            metadata: of the whole video; `total_num_frames` and `fps` are needed, `duration` is guessed without.
            fps: frames to take from a second; None takes the setting. GLM-4.6V's sampler ignores it, with a warning.
            max_duration: seconds sampled at that rate; None takes the setting. Only GLM-4.1V's obeys it.
            max_frames: frames at most; None takes the setting. Only GLM-GA's obeys it.
            **kwargs: ignored, `num_frames` among them, as in the reference.

        Returns:
            Ascending indices [T] int64, T even and at least 2: the last is repeated where needed.

        Raises:
            MediaError: the metadata lacks the frame rate, or is nonsense.
            ConfigError: an option is not a positive number.
        """
        clip = _whole_clip(metadata)
        sampler = SAMPLERS[self.row.sampler]
        options = {"fps": fps, "max_duration": max_duration, "max_frames": max_frames}
        given = {name: value for name, value in options.items() if value is not None}
        for name in sorted(given.keys() - sampler.settings):
            warnings.warn(
                f"{name}: found {given[name]}, which the frame sampler of {self.class_name} ignores; pass frames that "
                "are sampled already to choose them yourself",
                stacklevel=2,
            )
        settings = {name: given.get(name, getattr(self, name)) for name in sampler.settings}
        return take_frames(sampler, clip, {k: checked(k, v, self.constraints[k]) for k, v in settings.items()})

    def preprocess(self, videos: Any, **kwargs: Any) -> BatchFeature:
        """Decode, sample, resize, normalise and cut videos into patches, on all cores.

        Args:
            videos: a video, or lists of videos; see `flatten_videos` and `load_video`. Of files only the sampled frames
                are held in memory.
            **kwargs: settings for this call; `return_tensors` (None or "np"); and `video_metadata`, one `VideoMetadata`
                or dictionary a video given as frames (files bring their own). Unknown ones are logged and ignored.

        Returns:
            pixel_values_videos [sum of patches, C * temporal_patch_size * patch_size**2] float32, video_grid_thw
            [N, 3] int64, in patches; and with `return_metadata` video_metadata, a list of N `VideoMetadata` whose
            `frames_indices` are the frames taken.

        Raises:
            MediaError: a video cannot be loaded, sampled or prepared; the message says which.
            ConfigError: a setting has an impossible value, or `device` or `return_tensors` is one of torch's.
        """
        options = self.known(kwargs)
        settings = self.resolve(options)
        sources = flatten_videos(videos)
        metadata = flatten_metadata(settings["video_metadata"], len(sources))
        loaded = []
        for index, (item, known) in enumerate(zip(sources, metadata, strict=True)):
            source, own = MediaWithOptions.split(item)
            with naming_media("video", index, source):
                loaded.append(self._load(source, known, {**settings, **own}, {**options, **own}))
        patches, grids = cut_patches(
            [frames for frames, _ in loaded], settings, normalization_of(settings, fused=True), "video"
        )
        features = BatchFeature(pixel_values_videos=patches, video_grid_thw=grids)
        if settings["return_metadata"]:
            features["video_metadata"] = [taken for _, taken in loaded]
        return features

    def _load(
        self, source: Any, metadata: VideoMetadata | None, settings: Mapping[str, Any], asked: Mapping[str, Any]
    ) -> tuple[list[np.ndarray], VideoMetadata]:
        """The taken frames of a video, resized: T arrays [H, W, C]; `asked` are the settings that a call gave."""
        sampling = settings["do_sample_frames"]
        if isinstance(source, SampledVideo) and source.fps is None and (metadata is not None or not sampling):
            source = source.frames
        elif sampling and metadata is None and frame_files(source) is not None:
            # Nobody says how fast they were taken: that is how fast videos are sampled.
            source = SampledVideo(source)
        is_sampled = isinstance(source, SampledVideo)
        if isinstance(source, SampledVideo):
            source, metadata, sampling = source.frames, source.metadata(settings["fps"]), False
        if not sampling and metadata is not None and metadata.frames_indices is None and not is_path_like(source):
            raise MediaError(
                "video_metadata lacks `frames_indices`, which frames that are not sampled need for their timestamps; "
                "add them, or set `do_sample_frames=True`"
            )
        input_data_format = channel_format(settings["input_data_format"], "input_data_format")
        if input_data_format == NONE and is_array(source) and source.ndim == 3:
            source, input_data_format = np.asarray(source)[..., None], LAST

        def sample(whole: VideoMetadata) -> np.ndarray:
            indices = self.sample_frames(whole, **{name: asked.get(name) for name in _SAMPLING_OPTIONS})
            self._check_tokens(whole, len(indices), settings)
            return indices

        frames, taken = load_video(
            source,
            sample if sampling else None,
            metadata=metadata,
            do_convert_rgb=settings["do_convert_rgb"],
            **self.limits,
        )
        if is_sampled and len(frames) == 1:
            # As where sampling finds no more than one.
            frames = np.repeat(frames, settings["temporal_patch_size"], axis=0)
        given_as_arrays = is_array(source) or (isinstance(source, list) and is_array(source[0]))
        # Decoded frames and Pillow's have their channels last, whatever the arrays of the same batch have.
        frames = to_channels_last(frames, input_data_format if given_as_arrays else LAST)
        if settings["do_convert_rgb"]:
            frames = blend_on_white(frames)
        return self._resized(frames, settings), taken

    def _check_tokens(self, metadata: VideoMetadata, num_frames: int, settings: Mapping[str, Any]) -> None:
        if self.max_tokens is None or not metadata.height or not metadata.width:
            return
        patches = self._num_patches(num_frames, metadata.height, metadata.width, settings)
        if (tokens := patches // settings["merge_size"] ** 2) > self.max_tokens:
            raise MediaError(f"found {tokens:,} tokens of {num_frames} frames; expected at most {self.max_tokens:,}")

    def _resized(self, frames: np.ndarray, settings: Mapping[str, Any]) -> list[np.ndarray]:
        count, height, width, _ = frames.shape
        if not settings["do_resize"]:
            check_sides(settings, height, width)
            return list(frames)
        height, width = area_of(settings, count, height, width)
        return map_threads(lambda frame: resize_planes(frame, height, width, settings["resample"]), frames)

    def get_num_of_video_patches(
        self, num_frames: int, height: int, width: int, videos_kwargs: Mapping[str, Any] | None = None
    ) -> int:
        """Patches of a video of this size, before merging.

        Args:
            num_frames: frames taken of it.
            height: rows, in pixels.
            width: columns, in pixels.
            videos_kwargs: settings that override the processor's; entries that are None do not.

        Raises:
            MediaError: a size that cannot be prepared.
        """
        return self._num_patches(num_frames, height, width, videos_kwargs)
