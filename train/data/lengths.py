"""Lengths of records: in tokens, from the sizes of images alone, or in characters where there is no model."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from glm4v_jax.data.media import image_size
from glm4v_jax.errors import DataError, Glm4vError
from glm4v_jax.inputs.batch_feature import BatchFeature
from glm4v_jax.inputs.processor import Glm4vProcessor, PreparedMedia
from glm4v_jax.inputs.text.messages import extract_media
from glm4v_jax.inputs.text.placeholders import Expansion
from train.data.records import Record
from train.data.samples import prepare_videos
from train.data.turns import target_turns


def count_characters(record: Record) -> int:
    """Return the characters of all texts of a record."""
    return sum(len(item.get("text", "")) for message in record.messages for item in message["content"])


class TokenCounter:
    """Count tokens as `train.data.samples.encode` makes them by default; images are not decoded, videos are."""

    def __init__(self, processor: Glm4vProcessor):
        self._processor = processor

    def __call__(self, record: Record) -> int:
        """Return the number of tokens of a record; a DataError that it cannot be encoded begins with its place."""
        try:
            return self._count(record)
        except Glm4vError as error:
            raise DataError(f"{record.source}: {error}") from error

    def _count(self, record: Record) -> int:
        messages, _ = target_turns(record, "last", self._processor)
        return self.of(messages, record.media("image"), record.tools)

    def of(
        self,
        messages: Sequence[Mapping[str, Any]],
        images: Iterable[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] = (),
    ) -> int:
        """Return the number of tokens of messages, as chat templates take them, with their items that are images.

        Raises:
            Glm4vError: they cannot be encoded.
        """
        processor = self._processor
        text = processor.apply_chat_template(messages, tools=list(tools) or None)
        sizes = [image_size(item)[::-1] for item in images]
        counts = processor.get_num_multimodal_tokens(image_sizes=sizes).num_image_tokens or []
        _, videos = extract_media(messages, processor.template())
        media = PreparedMedia(
            BatchFeature(),
            [Expansion(processor.image_token * count, count) for count in counts],
            [expansion for prepared in prepare_videos(videos, processor) for expansion in prepared.videos],
        )
        return len(processor.assemble([text], media)["input_ids"][0])
