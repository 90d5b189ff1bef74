"""MathVista.

- As its makers publish it (https://github.com/lupantech/MathVista): testmini.json, an object of objects with "pid",
  "question", "image" ("images/1.jpg"), "choices", "unit", "precision", "answer", "question_type" ("multi_choice",
  "free_form"), "answer_type" ("text", "integer", "float", "list"), "metadata"; pictures in images/ beside it.
- Parquet of AI4Math/MathVista: the same fields, the picture in "decoded_image", and "query", the whole prompt.

The answers of the test split are not public.
"""

from collections.abc import Iterator, Mapping
from typing import Any

from eval.data import fields
from eval.data.fields import Row
from eval.data.questions import Origin, Question
from glm4v_jax.errors import DataError

_TYPES = ("multi_choice", "free_form")


def read(row: Row, origin: Origin) -> Iterator[Question]:
    """The question of a row.

    Raises:
      DataError: a field is missing or not what it should be.
    """
    kind = fields.text(row, "question_type")
    if kind not in _TYPES:
        raise DataError(f"field 'question_type': found {kind!r}, expected one of {', '.join(_TYPES)}")
    options = fields.options(row, "choices") if row.get("choices") else {}
    if kind == "multi_choice" and not options:
        raise DataError("field 'choices': found none for multi_choice, expected a list of texts")
    answer = fields.identifier(row, "answer")
    if kind == "multi_choice" and answer not in options.values():
        raise DataError(f"field 'answer': found {answer!r}, expected one of the choices")
    metadata = row.get("metadata")
    metadata = metadata if isinstance(metadata, Mapping) else {}
    reference: dict[str, Any] = {
        "answer": answer,
        "type": kind,
        "options": options or None,
        **fields.plain(row, "answer_type", "precision"),
        **fields.plain(metadata, "task", "skills", "category", "context", "grade"),
    }
    question = {
        "question": fields.text(row, "question"),
        "options": options,
        "unit": row.get("unit") or "",
        **fields.plain(row, "query", "answer_type", "precision"),
    }
    picture = fields.media(row, "image", "decoded_image", "image")
    task = metadata.get("task")
    yield Question(
        fields.identifier(row, "pid"), question, reference, [picture], task if isinstance(task, str) else None
    )
