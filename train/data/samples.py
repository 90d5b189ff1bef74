r"""A record as the model takes it: tokens, targets, positions, images and video frames.

On the host, in NumPy. The tokens are exactly those that the processor's `apply_chat_template` makes of the
conversation, since that is what the model sees when it answers. The targets are:

- In the assistant's turns that contribute to the loss (`Record.losses`): every token of the text, `<think>` and
  `<answer>` with their closing tags and calls of tools included, and after the last of them the *stop token*.
- Nowhere else: not in other turns, what tools answer among them, not in the header `<|assistant|>\n`, not in images and
  videos.

The stop token is the one with which the chat template continues where the user speaks next, or a tool after a call:
`<|user|>` for GLM-4.1V, which is among the `eos_token_id` of the released generation_config.json and the only end that
an answer without `</answer>` can have in a conversation. (LLaMA-Factory has the same target between turns, and
`<|endoftext|>` after the last.) It is a target after `</answer>` too, although our engine and transformers stop at that
one: other engines do not, and it is one token. After the last turn it is a target only, so the tokens stay those of the
template.
"""

import copy
import dataclasses
import functools
import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

import numpy as np

from glm4v_jax.config.checks import Positive, PositiveNumber, validate
from glm4v_jax.config.model import Glm4vConfig
from glm4v_jax.errors import CheckpointError, DataError, MediaError, MessageError, counted
from glm4v_jax.inputs.media.load import SampledVideo, is_path_like
from glm4v_jax.inputs.processor import Glm4vProcessor, PreparedMedia
from glm4v_jax.inputs.prompt import Prompt, prompts_of
from glm4v_jax.inputs.text.messages import extract_media
from glm4v_jax.inputs.vision.frame_sampling import SAMPLERS
from glm4v_jax.inputs.vision.settings import MediaWithOptions
from train.data.records import Record
from train.data.turns import Template, target_turns

IGNORED = -100
"""The target where there is none, as `labels` of the reference have it."""


@dataclasses.dataclass(frozen=True)
class EncodeOptions:
    """How records become samples.

    Attributes:
      max_length: the most tokens of a sample; None is no limit.
      too_long: what to do with a longer one: "error" raises, "drop" drops it (`encode` returns None), "cut" keeps the
        first `max_length` tokens, fewer where that would cut an image or video.
      keep_thoughts: which of the assistant's turns keep `<think>...</think>`. "last" is as in generation: turns before
        the last question have answers alone (`without_thoughts`), and those after it, to the last target, keep their
        thoughts. Turns that lose a thought in this way are context and not targets: they would teach to answer without
        one. "all" changes nothing; "none" removes the thoughts of every turn, so that targets are answers alone.
      image_max_pixels: the most pixels of an image, height x width after resizing; None is the checkpoint's limit.
      video_max_pixels: the same for a video, frames x height x width.
      video_fps: frames per second sampled from a file; None is the checkpoint's rate. A video given as frames is not
        sampled: its rate is `"fps"` of its item (`{"type": "video", "video": frames, "fps": 4}`), else this one.

    Raises:
      DataError: a field is invalid.
    """

    max_length: Positive | None = None
    too_long: Literal["error", "drop", "cut"] = "error"
    keep_thoughts: Literal["last", "all", "none"] = "last"
    image_max_pixels: Positive | None = None
    video_max_pixels: Positive | None = None
    video_fps: PositiveNumber | None = None

    def __post_init__(self) -> None:
        validate(self, DataError)


@dataclasses.dataclass(frozen=True, eq=False)
class Sample:
    """One conversation of T tokens.

    Attributes:
      prompt: its tokens, positions, images and videos.
      targets: int32 [T], the token to predict after each, -100 where there is none.
      source: place of the record.
      second: of a preferred and a rejected conversation, which share their images, where the latter begins; else 0.
      reference: log probabilities of both of their answers under the model that they are compared with.
    """

    prompt: Prompt
    targets: np.ndarray
    source: str
    second: int = 0
    reference: tuple[float, float] = (0.0, 0.0)

    def __len__(self) -> int:
        return len(self.prompt)

    @property
    def input_ids(self) -> np.ndarray:
        """int32 [T]."""
        return self.prompt.input_ids

    @property
    def position_ids(self) -> np.ndarray:
        """int32 [3, T], of this conversation alone."""
        return self.prompt.position_ids

    @functools.cached_property
    def frames(self) -> np.ndarray:
        """int64 [F, 2]: height and width, in patches, of the images and video frames in the order of their tokens."""
        return np.concatenate([np.zeros((0, 2), np.int64), *(medium.frames for medium in self.prompt.media)])

    @property
    def num_targets(self) -> int:
        """How many tokens are targets; at least 1."""
        return int(np.count_nonzero(self.targets != IGNORED))


def encode(
    record: Record, processor: Glm4vProcessor, config: Glm4vConfig, options: EncodeOptions | None = None
) -> Sample | None:
    """Encode a record.

    Returns:
      The sample; None if it is too long and `options.too_long` is "drop".

    Raises:
      DataError: the record is malformed, its images cannot be loaded, it has no target, or it is too long; the message
        begins with the record's place.
      CheckpointError: the chat template or the tokenizer does not separate turns.
    """
    options = options or EncodeOptions()
    processor = limited(processor, options)
    try:
        if record.rejected is None:
            return _encode(record, processor, config, options)
        return _pair(record, record.rejected, processor, config, options)
    except (DataError, MediaError, MessageError) as error:
        raise DataError(f"{record.source}: {error}") from error


def _encode(record: Record, processor: Glm4vProcessor, config: Glm4vConfig, options: EncodeOptions) -> Sample | None:
    messages, targets = target_turns(record, options.keep_thoughts, processor)
    text = processor.apply_chat_template(messages, tools=list(record.tools) or None)
    turns = Template(processor, record.tools)
    stops = [turns.stop_token(config, after_call="tool_calls" in messages[index]) for index in targets]
    pieces = [text[start:end] for start, end in _alternating(turns.spans(messages, targets, text), len(text))]
    media = _media(messages, turns.source, processor)
    inputs = processor.assemble([text], media)
    _check_patches(inputs, config)
    (prompt,) = prompts_of(inputs, config)
    parts = [np.asarray(part, np.int32) for part in processor.assemble(pieces, media)["input_ids"]]
    if not np.array_equal(np.concatenate(parts), prompt.input_ids):
        raise DataError(
            "found a token across the start or the end of an answer; expected a tokenizer that separates them"
        )
    sample = Sample(prompt, _targets(parts, stops), record.source)
    if options.max_length is not None and len(sample) > options.max_length:
        if options.too_long == "drop":
            return None
        if options.too_long == "error":
            raise DataError(f"found {counted(len(sample), 'token')}; {_expected(options)}")
        sample = _cut(sample, options.max_length, config)
        if not sample.num_targets:
            raise DataError(
                f"found no target in the first {counted(len(sample), 'token')}, cut at max_length; expected some"
            )
    return sample


def _pair(
    chosen: Record, rejected: Record, processor: Glm4vProcessor, config: Glm4vConfig, options: EncodeOptions
) -> Sample | None:
    """Encode two conversations one after the other; the second one's images are those of the first."""
    alone = dataclasses.replace(options, max_length=None)
    first, second = (_encode(record, processor, config, alone) for record in (chosen, rejected))
    assert first is not None and second is not None
    if [medium.key for medium in first.prompt.media] != [medium.key for medium in second.prompt.media]:
        raise DataError("rejected: found other images or videos than in the chosen conversation; expected the same")
    length = len(first) + len(second)
    if options.max_length is not None and length > options.max_length:
        if options.too_long == "drop":
            return None
        raise DataError(f"found {length} tokens of both answers; {_expected(options)}")
    prompt = dataclasses.replace(
        first.prompt,
        input_ids=np.concatenate([first.input_ids, second.input_ids]),
        position_ids=np.concatenate([first.position_ids, second.position_ids], axis=1),
        medium_of=np.concatenate([first.prompt.medium_of, second.prompt.medium_of]),
        offset_of=np.concatenate([first.prompt.offset_of, second.prompt.offset_of]),
    )
    return Sample(prompt, np.concatenate([first.targets, second.targets]), first.source, len(first))


def _expected(options: EncodeOptions) -> str:
    return f"expected at most {options.max_length}: batch.length, or data.max_length where that is less"


def _alternating(spans: Sequence[tuple[int, int]], length: int) -> Iterator[tuple[int, int]]:
    """Yield spans and the gaps before, between and after them: even entries are the gaps, odd ones the spans."""
    done = 0
    for start, stop in spans:
        yield done, start
        yield start, stop
        done = stop
    yield done, length


def _targets(parts: Sequence[np.ndarray], stops: Sequence[int]) -> np.ndarray:
    """int32 [T]: the targets of a text in parts, of which every second one is an answer, with the token after each."""
    targets = np.full(sum(map(len, parts)), IGNORED, np.int32)
    done = 0
    for index, part in enumerate(parts):
        if index % 2:
            # A token is predicted from the one before it, the first of an answer from the last of its header.
            targets[done - 1 : done + len(part) - 1] = part
            targets[done + len(part) - 1] = stops[index // 2]
        done += len(part)
    return targets


def _media(messages: Sequence[Mapping[str, Any]], source: str, processor: Glm4vProcessor) -> PreparedMedia:
    """Images and videos of a conversation."""
    images, videos = extract_media(messages, source)
    parts = [processor.prepare_media([images])] if images else []
    parts += prepare_videos(videos, processor)
    # A large image is 100 MB, which joining would copy.
    return parts[0] if len(parts) == 1 else PreparedMedia.joined(parts)


def prepare_videos(videos: Sequence[Any], processor: Glm4vProcessor) -> Iterator[PreparedMedia]:
    """Prepare videos, as `extract_media` returns them, one by one; frames without a rate count as sampled."""
    for video in videos:
        source, own = MediaWithOptions.split(video)
        if not is_path_like(source):
            frames, rate = (source.frames, source.fps) if isinstance(source, SampledVideo) else (source, None)
            video = MediaWithOptions(SampledVideo(frames, rate or processor.video_processor.fps), own)
        yield processor.prepare_media(videos=[video])


def limited(processor: Glm4vProcessor, options: EncodeOptions) -> Glm4vProcessor:
    """Return a processor that prepares images and videos as these options say; warn of a rate that it ignores."""
    processor = copy.copy(processor)
    image = processor.image_processor = copy.copy(processor.image_processor)
    video = processor.video_processor = copy.copy(processor.video_processor)
    # The processor counts an image once for each frame of a temporal patch, and all frames of a video.
    for part, pixels, factor in (
        (image, options.image_max_pixels, image.temporal_patch_size),
        (video, options.video_max_pixels, 1),
    ):
        if pixels is not None:
            largest = min(pixels * factor, part.size["longest_edge"])
            part.size = {"shortest_edge": min(part.size["shortest_edge"], largest), "longest_edge": largest}
    if options.video_fps is not None:
        video.fps = options.video_fps
        if "fps" not in SAMPLERS[video.row.sampler].settings:
            found = f"video_fps: found {video.fps}, which the frame sampler of {video.class_name} ignores"
            warnings.warn(f"{found}; pass frames that are sampled already to choose them yourself", stacklevel=2)
    return processor


def _check_patches(inputs: Mapping[str, Any], config: Glm4vConfig) -> None:
    expected = config.vision_config.patch_dim
    for name in ("pixel_values", "pixel_values_videos"):
        if name in inputs and (found := inputs[name].shape[1]) != expected:
            raise CheckpointError(
                f"preprocessor_config.json: found patches of {found} numbers; expected {expected}, as config.json has "
                "it"
            )


def _cut(sample: Sample, length: int, config: Glm4vConfig) -> Sample:
    """At most the first `length` tokens, with whole images and videos; the last target is the first token after."""
    is_open = np.zeros(length + 1, bool)
    for begin, end in (
        (config.image_start_token_id, config.image_end_token_id),
        (config.video_start_token_id, config.video_end_token_id),
    ):
        depth = np.cumsum((sample.input_ids[:length] == begin).astype(int) - (sample.input_ids[:length] == end))
        is_open[1:] |= depth > 0
    # Inside an image, the position after the last closing tag is the one before the image.
    length = int(np.flatnonzero(~is_open)[-1])
    return dataclasses.replace(sample, prompt=sample.prompt.truncated(length), targets=sample.targets[:length])
