"""Our own rows: questions in json, jsonl, Parquet or tsv files, for any metric.

A row is an object with these fields; null is as if a field were not there:

- "question": the text; `<image>` and `<video>` in it say where pictures and videos go, in their order, else they stand
  before it. Needed.
- "image", "images", "video", "videos": one or a list, each a path relative to the file, an http(s), file or data
  address, base64 text, or `{"bytes": ..., "path": ...}` as in tables of Hugging Face; a video also a list of such
  pictures, its frames, all of which are taken.
- "fps": how many of these frames a second has; 2 by default, as the model's processor takes them of a film.
- "id": text or whole number, different for each row; the number of the row in all files by default.
- "answer": text or number; "answers": a list of them, of which one has to be met. Multiple choice: the letter.
- "options": `{"A": "text", ...}`, or a list of texts for A, B, C, ...
- "boxes": `[[x1, y1, x2, y2], ...]` in pixels of the first picture; with "width" and "height", in units of which the
  picture has so many: 1000 and 1000 for coordinates as the model writes them.
- "group": text; scores are told by it too.
- "type" and all other fields: for the prompt's template, and for the metric if it knows them (`eval.metrics`).

At least one of "answer", "answers" and "boxes" is needed. Which of them, the metric says.
"""

import math
from collections.abc import Iterator, Mapping
from typing import Any

from eval.data import fields
from eval.data.fields import Media, Row
from eval.data.questions import Origin, Question
from glm4v_jax.data.media import kind_of, media_item, source_of
from glm4v_jax.errors import DataError

_MEDIA = {"image": "image", "images": "image", "video": "video", "videos": "video"}
_EXPECTED = ("answer", "answers", "boxes")
_FPS = 2
"""Of frames whose row says nothing of it."""


def read(row: Row, origin: Origin) -> Iterator[Question]:
    """The question of a row.

    Raises:
      DataError: a field is missing or not what it should be; the message does not name the place.
    """
    question = fields.text(row, "question")
    known: dict[str, Any] = {name: value for name, value in row.items() if name not in _MEDIA and _is_plain(value)}
    if not any(known.get(name) is not None for name in _EXPECTED):
        raise DataError(f"field {' or '.join(map(repr, _EXPECTED))}: missing in the row, expected at least one")
    if known.get("options") is not None:
        known["options"] = fields.options(row, "options")
    if known.get("answers") is not None:
        known["answers"] = fields.texts(row, "answers", is_literal=True)
    if known.get("answer") is not None:
        known["answer"] = _answer(known["answer"])
    if known.get("boxes") is not None:
        known["boxes"] = [list(fields.box({"boxes": one}, "boxes")) for one in _list(row, "boxes")]
    media = _media(row)
    is_marked = any(f"<{kind}>" in question for kind in ("image", "video"))
    if is_marked:
        _check_markers(question, media)
    group = fields.text(row, "group") if row.get("group") is not None else None
    name = fields.identifier(row, "id") if row.get("id") is not None else str(origin.total)
    reference = {field: value for field, value in known.items() if field not in ("question", "group")}
    yield Question(name, {**known, "question": question}, reference, media, group, is_marked)


def _media(row: Row) -> list[Media]:
    found = []
    for name, kind in _MEDIA.items():
        if row.get(name) is None:
            continue
        is_several = name.endswith("s")
        for index, value in enumerate(_list(row, name) if is_several else [row[name]]):
            item = media_item(kind, value, f"{name}[{index}]" if is_several else name)
            # Frames that do not say when they were are no video for the processor.
            found.append({**item, "fps": _rate(row)} if isinstance(source_of(item), list) else item)
    return found


def _rate(row: Row) -> float:
    rate = _FPS if row.get("fps") is None else row["fps"]
    if isinstance(rate, bool) or not isinstance(rate, int | float) or not 0 < rate < math.inf:
        raise DataError(f"field 'fps': found {kind_of(rate)}, expected a positive number")
    return rate


def _list(row: Row, name: str) -> list[Any]:
    value = fields.literal_list(row[name])
    if not isinstance(value, list | tuple):
        raise DataError(f"field {name!r}: found {kind_of(value)}, expected a list")
    return list(value)


def _answer(value: Any) -> str:
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise DataError(f"field 'answer': found {kind_of(value)}, expected text or a number")
    return str(value)


def _check_markers(question: str, media: list[Media]) -> None:
    for kind in ("image", "video"):
        markers, given = question.count(f"<{kind}>"), sum(item["type"] == kind for item in media)
        if markers != given:
            raise DataError(f"field 'question': found {markers} <{kind}> for {given} {kind}s, expected as many")


def _is_plain(value: Any) -> bool:
    """Whether JSON can hold it."""
    if isinstance(value, Mapping):
        return all(isinstance(name, str) and _is_plain(one) for name, one in value.items())
    if isinstance(value, list | tuple):
        return all(_is_plain(one) for one in value)
    return value is None or isinstance(value, str | int | float)
