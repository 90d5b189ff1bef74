"""What training data contains, and which rows cannot be trained on, without a model or a device."""

import collections
import dataclasses
import os
from collections.abc import Callable, Mapping
from typing import Any

from glm4v_jax.data.media import image_size, is_remote, source_of
from glm4v_jax.errors import DataError, Glm4vError, MediaError, not_there
from glm4v_jax.inputs.media.fetch import is_address
from glm4v_jax.inputs.media.load import frame_files, load_image, load_video
from train.data.histogram import percentile
from train.data.lengths import count_characters
from train.data.records import Record, Records

LISTED = 20
"""How many bad rows are kept with their reasons."""


@dataclasses.dataclass(frozen=True)
class BadRow:
    """A row that cannot be trained on: its place, and why."""

    place: str
    reason: str


@dataclasses.dataclass
class DataReport:
    """Results of a check.

    Attributes:
        total: rows in the data.
        checked: rows that were checked.
        bad: of these, rows that cannot be trained on; the fields below count the others.
        problems: the first bad rows.
        formats: name of a format -> rows.
        messages, learned: messages in all, and those that contribute to the loss.
        pictures, videos: images and videos in all, remote ones included.
        remote: images and videos at URLs, which were not checked.
        text_only: records without images and videos.
        unit: what `lengths` count.
        lengths: of each record.
        most: the greatest of them; -1 if there are none.
        longest: place of that record.
    """

    total: int
    unit: str
    checked: int = 0
    bad: int = 0
    problems: list[BadRow] = dataclasses.field(default_factory=list)
    formats: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)
    messages: int = 0
    learned: int = 0
    pictures: int = 0
    videos: int = 0
    remote: int = 0
    text_only: int = 0
    lengths: list[int] = dataclasses.field(default_factory=list)
    most: int = -1
    longest: str | None = None

    @property
    def summary(self) -> dict[str, int]:
        """min, median, p95, max and sum of the lengths; empty if there are none."""
        if not self.lengths:
            return {}
        median, p95 = percentile(self.lengths, 50), percentile(self.lengths, 95)
        ends = min(self.lengths), max(self.lengths)
        return {"min": ends[0], "median": median, "p95": p95, "max": ends[1], "sum": sum(self.lengths)}

    def to_dict(self) -> dict[str, Any]:
        """Return all but the single lengths, for JSON."""
        fields = dataclasses.asdict(self) | {"formats": dict(self.formats), "lengths": self.summary}
        return fields | {"good": self.checked - self.bad}


def check(
    records: Records,
    *,
    measure: Callable[[Record], int] = count_characters,
    unit: str = "characters",
    limit: int | None = None,
    decode: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> DataReport:
    """Check every record.

    `measure` returns a record's length in `unit`; it raises `Glm4vError` for one that cannot be encoded. With `decode`
    images and videos are decoded, remote ones too; otherwise files must exist, and images have a valid header.
    `progress` is called with the number of rows done, and of rows to do. DataError if `limit`, the number of rows to
    check, is not positive.
    """
    if limit is not None and limit < 1:
        raise DataError(f"limit: found {limit}; expected at least 1")
    report = DataReport(len(records), unit)
    count = len(records) if limit is None else min(limit, len(records))
    for index in range(count):
        report.checked += 1
        try:
            record = records[index]
            remote = sum(not _check_media(item, decode) for item in record.media())
            length = measure(record) + (0 if record.rejected is None else measure(record.rejected))
        except (Glm4vError, OSError) as error:
            report.bad += 1
            if len(report.problems) < LISTED:
                place = records.place(index)
                report.problems.append(BadRow(place, str(error).removeprefix(f"{place}: ")))
        else:
            _add(report, record, records.format(index), remote, length)
        if progress is not None:
            progress(report.checked, count)
    return report


def _add(report: DataReport, record: Record, format: str, remote: int, length: int) -> None:
    pictures, videos = len(record.media("image")), len(record.media("video"))
    report.formats[format] += 1
    report.messages += len(record.messages)
    report.learned += sum(record.losses)
    report.pictures += pictures
    report.videos += videos
    report.remote += remote
    report.text_only += not (pictures or videos)
    if length > report.most:
        report.most, report.longest = length, record.source
    report.lengths.append(length)


def _check_media(item: Mapping[str, Any], decode: bool) -> bool:
    """Raise an error for an image or video that is missing or cannot be read; return False if it was not checked."""
    if is_remote(item) and not decode:
        return False
    source = source_of(item)
    if "path" in item and not os.path.exists(source):
        raise MediaError(not_there(source, "an image or a video"))
    if item["type"] == "image":
        image_size(item)
        if decode:
            load_image(source)
        return True
    if decode:
        load_video(source)
    for frame in item["video"] if isinstance(item.get("video"), list) else frame_files(source) or []:
        if isinstance(frame, os.PathLike) or (isinstance(frame, str) and not is_address(frame)):
            image_size({"type": "image", "path": frame})
    return True
