"""Our own rows: questions in JSON, JSON lines, Parquet, Arrow, CSV or TSV files, for any metric.

A row is an object with these fields; null is as if a field were missing, and so are images that are "" or [null]:

- "question": the text; `<image>` and `<video>` in it say where images and videos go, in their order, else they stand
  before it. Required, but by tasks that always ask the same (the reader "images").
- "image", "images", "video", "videos": one or a list, each a path relative to the file, an http(s), file or data
  address, base64 text, or `{"bytes": ..., "path": ...}` as in tables of Hugging Face; a video also a directory or a
  list of such images, its frames, all of which are shown.
- "fps": frames per second of these frames; 2 by default, the rate at which the model's processor samples videos. Of a
  video in a file, as many are taken.
- "id": text or integer, unique; the number of the row in all files by default.
- "answer": text or number; "answers": a list of them, one of which has to be met. Multiple choice: the letter.
- "options": `{"A": "text", ...}`, or a list of texts for A, B, C, ...
- "boxes": `[[x1, y1, x2, y2], ...]` in pixels of the first image; with "width" and "height", in their
  units instead: 1000 and 1000 for coordinates as the model writes them.
- "group": text; scores are reported for each group too.
- "type" and all other fields: for the prompt's template, and for the metric if it reads them (`eval.metrics`).

At least one of "answer", "answers" and "boxes" is required; which of them, the metric says.
"""

import math
from collections.abc import Iterator, Mapping
from typing import Any

from eval.data import fields
from eval.data.fields import Fields
from eval.data.questions import Origin, Question
from glm4v_jax.data.media import MEDIA_FIELDS, MediaItem, is_empty, media_item, media_values, source_of
from glm4v_jax.data.tables import literal_list
from glm4v_jax.errors import DataError, counted

_EXPECTED = ("answer", "answers", "boxes")
_FPS = 2
"""Frames per second of a video given as frames, where the row has no "fps"."""


def read(row: Fields, origin: Origin, is_question_needed: bool = True) -> Iterator[Question]:
    """Read the question of a row; without one, where none is needed, it is empty.

    Raises:
      DataError: a field is missing or invalid; the message does not name the place.
    """
    question = fields.text(row, "question") if is_question_needed or row.get("question") is not None else ""
    known: dict[str, Any] = {name: value for name, value in row.items() if name not in MEDIA_FIELDS and _is_json(value)}
    fields.first(known, *_EXPECTED)
    if known.get("options") is not None:
        known["options"] = fields.options(row, "options")
    if known.get("answers") is not None:
        known["answers"] = fields.texts(row, "answers", is_literal=True)
    if known.get("answer") is not None:
        known["answer"] = fields.scalar(row, "answer")
    if known.get("boxes") is not None:
        known["boxes"] = [list(fields.box({"boxes": one}, "boxes")) for one in fields.items_of(row, "boxes")]
    media = _media(row)
    is_marked = any(f"<{kind}>" in question for kind in ("image", "video"))
    if is_marked:
        _check_markers(question, media)
    group = fields.text(row, "group") if row.get("group") is not None else None
    name = fields.identifier(row, "id") if row.get("id") is not None else str(origin.total)
    reference = {field: value for field, value in known.items() if field not in ("question", "group")}
    yield Question(name, {**known, "question": question}, reference, media, group, is_marked)


def _media(row: Fields) -> list[MediaItem]:
    found = []
    for name, kind in MEDIA_FIELDS.items():
        values = literal_list(row.get(name))
        is_list = name.endswith("s") and isinstance(values, list | tuple)
        for index, value in enumerate(media_values(kind, values) if is_list else [values]):
            if is_empty(value):
                continue
            item = media_item(kind, value, f"{name}[{index}]" if is_list else name)
            # Of a video that is its frames, perhaps in a directory; the processor takes those of a list only with it.
            has_rate = kind == "video" and (row.get("fps") is not None or isinstance(source_of(item), list))
            found.append({**item, "fps": _rate(row)} if has_rate else item)
    return found


def _rate(row: Fields) -> float:
    rate = _FPS if row.get("fps") is None else row["fps"]
    if isinstance(rate, bool) or not isinstance(rate, int | float) or not 0 < rate < math.inf:
        raise fields.invalid("fps", rate, "a number above 0")
    return rate


def _check_markers(question: str, media: list[MediaItem]) -> None:
    for kind in ("image", "video"):
        markers, given = question.count(f"<{kind}>"), sum(item["type"] == kind for item in media)
        if markers != given:
            raise DataError(f"question: found {markers} <{kind}> for {counted(given, kind)}; expected as many")


def _is_json(value: Any) -> bool:
    """Whether JSON can hold it."""
    if isinstance(value, Mapping):
        return all(isinstance(name, str) and _is_json(one) for name, one in value.items())
    if isinstance(value, list | tuple):
        return all(_is_json(one) for one in value)
    return value is None or isinstance(value, str | int | float)
