"""ChartQA in each of its layouts.

- Its own (https://github.com/vis-nlp/ChartQA): test_human.json and test_augmented.json with "imgname", "query" and
  "label", and the pictures in png/ beside them.
- lmms-lab's Parquet: "image", "question", "answer", "type" ("human_test", "augmented_test").
- HuggingFaceM4's Parquet: "image", "query", "label", a list, "human_or_machine", 0 or 1.
"""

from collections.abc import Iterator

from eval.data import fields
from eval.data.adapters.nearby import nearby
from eval.data.fields import Row
from eval.data.questions import Origin, Question
from glm4v_jax.errors import DataError

_TYPES = ("human", "augmented")


def read(row: Row, origin: Origin) -> Iterator[Question]:
    """The question of a row.

    Raises:
      DataError: a field is missing or not what it should be.
    """
    if row.get("image") is not None:
        picture = fields.media(row, "image", "image")
    else:
        name = fields.text(row, "imgname", "image")
        picture = {"type": "image", "path": nearby(origin, "imgname", [name], ["png", "."])}
    question = fields.text(row, "question", "query")
    kind = _type(row, origin)
    reference = {"answers": fields.texts(row, "answer", "label"), "type": kind}
    yield Question(origin.name, {"question": question}, reference, [picture], kind)


def _type(row: Row, origin: Origin) -> str:
    """Who asks: "human", or "augmented", a machine."""
    if row.get("human_or_machine") is not None:
        number = row["human_or_machine"]
        if number not in (0, 1):
            raise DataError(f"field 'human_or_machine': found {number!r}, expected 0 or 1")
        return _TYPES[int(number)]
    said = fields.text(row, "type") if row.get("type") is not None else origin.path.stem
    for kind in _TYPES:
        if kind in said:
            return kind
    raise DataError(f"field 'type': found none in the row and {said!r} as the file's name, expected human or augmented")
