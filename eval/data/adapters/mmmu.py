"""MMMU in Parquet, of MMMU/MMMU (a folder for each subject) or lmms-lab/MMMU (one file for each split).

Fields: "id" ("validation_Accounting_1"), "question" and "options" with `<image 1>` where a picture belongs, "image_1"
to "image_7", "question_type" ("multiple-choice" or "open"), "answer"; "options", and several answers of an open
question, as a Python list in text. A picture that is mentioned twice is shown twice, as in VLMEvalKit; one that is not
is not shown, unless none is mentioned. The answers of the test split are not public: "?".
"""

from collections.abc import Iterator
from typing import Any

from eval.data import fields
from eval.data.fields import Media, Row
from eval.data.questions import Origin, Question
from eval.metrics.mmmu import domain_of, subject_of
from glm4v_jax.errors import DataError

_TYPES = ("multiple-choice", "open")
_MOST_PICTURES = 7


def read(row: Row, origin: Origin) -> Iterator[Question]:
    """The question of a row.

    Raises:
      DataError: a field is missing or not what it should be.
    """
    name = fields.identifier(row, "id")
    kind = fields.text(row, "question_type")
    if kind not in _TYPES:
        raise DataError(f"field 'question_type': found {kind!r}, expected one of {', '.join(_TYPES)}")
    reference: dict[str, Any] = {"id": name, "type": kind}
    options: dict[str, str] = {}
    if kind == "open":
        reference["answers"] = fields.texts(row, "answer", is_literal=True)
    else:
        options = fields.options(row, "options")
        reference |= {"options": options, "answer": fields.answer_letter(row, "answer", options)}
    reference["subject"] = subject_of(reference)
    question = {"question": fields.text(row, "question"), "options": options}
    yield Question(name, question, reference, _pictures(row), domain_of(reference), is_marked=True)


def _pictures(row: Row) -> list[Media]:
    """Those up to the first that is missing: `<image 2>` is the second."""
    pictures = []
    for number in range(1, _MOST_PICTURES + 1):
        if row.get(f"image_{number}") is None:
            break
        pictures.append(fields.media(row, "image", f"image_{number}"))
    return pictures
