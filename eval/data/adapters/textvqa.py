"""TextVQA.

- As its makers publish it (https://textvqa.org/dataset): TextVQA_0.5.1_val.json, an object whose "data" has
  "question_id", "image_id", "question" and ten "answers"; pictures, named by "image_id", are beside it in train_images/
  or train_val_images/train_images/.
- lmms-lab's Parquet: the same fields, with the pictures in "image", and "ocr_tokens".

The answers of the test split are not public.
"""

from collections.abc import Iterator

from eval.data import fields
from eval.data.adapters.nearby import nearby
from eval.data.fields import Row
from eval.data.questions import Origin, Question

_FOLDERS = ["train_images", "train_val_images/train_images", "images", "."]


def read(row: Row, origin: Origin) -> Iterator[Question]:
    """The question of a row.

    Raises:
      DataError: a field is missing or not what it should be.
    """
    if row.get("image") is not None:
        picture = fields.media(row, "image", "image")
    else:
        name = f"{fields.identifier(row, 'image_id')}.jpg"
        picture = {"type": "image", "path": nearby(origin, "image_id", [name], _FOLDERS)}
    tokens = fields.texts(row, "ocr_tokens") if row.get("ocr_tokens") else []
    question = {"question": fields.text(row, "question"), "ocr_tokens": tokens}
    reference = {"answers": fields.texts(row, "answers")}
    yield Question(fields.identifier(row, "question_id"), question, reference, [picture])
