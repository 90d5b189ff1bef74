"""RefCOCO, RefCOCO+ and RefCOCOg in the Parquet files of lmms-lab (https://huggingface.co/datasets/lmms-lab/RefCOCO).

Fields: "question_id", "image", "bbox" [x, y, width, height] in pixels, "answer": the expressions that mean the object;
its "question" asks for a caption and is not used. Every expression is a question of its own, as in lmms-eval. The split
is the file's: "testA" of testA-00000-of-00001.parquet.
"""

from collections.abc import Iterator

from eval.data import fields
from eval.data.fields import Row
from eval.data.questions import Origin, Question
from glm4v_jax.errors import DataError


def read(row: Row, origin: Origin) -> Iterator[Question]:
    """A question for each expression of a row.

    Raises:
      DataError: a field is missing or not what it should be.
    """
    x, y, width, height = fields.box(row, "bbox")
    if width <= 0 or height <= 0:
        raise DataError(f"field 'bbox': found width {width:g} and height {height:g}, expected positive ones")
    picture = fields.media(row, "image", "image")
    name = fields.identifier(row, "question_id")
    reference = {"boxes": [[x, y, x + width, y + height]], "split": origin.split}
    for number, expression in enumerate(fields.texts(row, "answer")):
        yield Question(f"{name}:{number}", {"question": expression}, reference, [picture], origin.split)
