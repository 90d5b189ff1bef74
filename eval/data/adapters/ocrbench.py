"""OCRBench.

- As its makers publish it (https://github.com/Yuliang-Liu/MultimodalOCR): OCRBench.json, a list with "id",
  "dataset_name", "image_path", "question", "answers" (a text or a list) and "type"; pictures in OCRBench_Images/.
- Parquet of echo840/OCRBench: "dataset", "question", "question_type", "answer" (a list), "image".
- tsv of VLMEvalKit: "index", "image" as base64, "question", "answer" as a Python list, "category".

Of the first layout the field names are those that lmms-eval reads; the file itself was not at hand.
"""

from collections.abc import Iterator

from eval.data import fields
from eval.data.adapters.nearby import nearby
from eval.data.fields import Row
from eval.data.questions import Origin, Question

_FOLDERS = ["OCRBench_Images", ".", "images"]


def read(row: Row, origin: Origin) -> Iterator[Question]:
    """The question of a row.

    Raises:
      DataError: a field is missing or not what it should be.
    """
    if row.get("image") is not None:
        picture = fields.media(row, "image", "image")
    else:
        picture = {
            "type": "image",
            "path": nearby(origin, "image_path", [fields.text(row, "image_path", "image")], _FOLDERS),
        }
    kind = fields.text(row, "question_type", "type", "category")
    is_table = origin.path.suffix.lower() == ".tsv"
    reference = {"answers": fields.texts(row, "answers", "answer", is_literal=is_table), "type": kind}
    dataset = row.get("dataset") or row.get("dataset_name")
    if isinstance(dataset, str):
        reference["dataset"] = dataset
    question = {"question": fields.text(row, "question").strip()}
    yield Question(origin.name, question, reference, [picture], kind)
