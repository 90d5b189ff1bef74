"""DocVQA and InfographicVQA.

- As its makers publish them (https://rrc.cvc.uab.es/?ch=17): a json object whose "data" has "questionId", "question",
  "answers" and "image" ("documents/pybv0228_81.png") or "image_local_name"; pictures lie in a folder beside the file
  or beside the file's folder.
- lmms-lab's Parquet: the same fields, with the pictures in "image".

The answers of the test split are not public.
"""

from collections.abc import Iterator

from eval.data import fields
from eval.data.adapters.nearby import nearby
from eval.data.fields import Row
from eval.data.questions import Origin, Question

_FOLDERS = [
    f"{above}{folder}"
    for above in ("", "../")
    for folder in (".", "documents", "images", "spdocvqa_images", "infographicsvqa_images")
]


def read(row: Row, origin: Origin) -> Iterator[Question]:
    """The question of a row.

    Raises:
      DataError: a field is missing or not what it should be.
    """
    name, value = fields.first(row, "image", "image_local_name")
    if isinstance(value, str):
        file = fields.text(row, name)
        picture = {"type": "image", "path": nearby(origin, name, [file, file.rsplit("/", 1)[-1]], _FOLDERS)}
    else:
        picture = fields.media(row, "image", name)
    reference = {"answers": fields.texts(row, "answers"), **fields.plain(row, "question_types")}
    question = {"question": fields.text(row, "question")}
    yield Question(fields.identifier(row, "questionId", "question_id"), question, reference, [picture])
