"""ScreenSpot and ScreenSpot-v2: clicking on what an instruction means.

- As its makers publish it (https://github.com/njucckevin/SeeClick): screenspot_web.json and others, lists with
  "img_filename", "bbox" [x, y, width, height] in pixels, "instruction", "data_type" ("text", "icon"), "data_source"
  ("ios", "windows", "shop", ...); pictures in screenspot_imgs/ or screenspotv2_image/ beside the file.
- Parquet of rootsautomation/ScreenSpot: "image", "file_name", the same other fields, but "bbox" [x1, y1, x2, y2] as
  shares from 0 to 1, which is how lmms-eval compares it.
- tsv of VLMEvalKit: as the first, with "image" as base64 and the instruction as "question".

VLMEvalKit takes x + width - 1 for the right edge, which belongs to the box; here it is x + width.
"""

from collections.abc import Iterator

from eval.data import fields
from eval.data.adapters.nearby import nearby
from eval.data.fields import Media, Row
from eval.data.questions import Origin, Question
from eval.metrics.points import platform_and_kind
from glm4v_jax.data.media import located, picture_size
from glm4v_jax.errors import DataError

_FOLDERS = ["screenspot_imgs", "screenspotv2_image", "images", "."]


def read(row: Row, origin: Origin) -> Iterator[Question]:
    """The question of a row.

    Raises:
      DataError: a field is missing or not what it should be.
      MediaError: the picture whose size is needed cannot be read.
    """
    if row.get("image") is not None:
        picture = fields.media(row, "image", "image")
    else:
        name = fields.text(row, "img_filename", "image")
        picture = {"type": "image", "path": nearby(origin, "img_filename", [name], _FOLDERS)}
    kind, source = fields.text(row, "data_type"), fields.text(row, "data_source")
    reference = {"boxes": [_box(row, picture, origin)], "data_type": kind, "data_source": source}
    question = {"question": fields.text(row, "instruction", "question")}
    yield Question(origin.name, question, reference, [picture], platform_and_kind(reference))


def _box(row: Row, picture: Media, origin: Origin) -> list[float]:
    """x1, y1, x2, y2 in pixels."""
    one, two, three, four = values = fields.box(row, "bbox")
    if row.get("file_name") is None:
        return [one, two, one + three, two + four]
    if not 0 <= min(values) <= max(values) <= 1:
        raise DataError(f"field 'bbox': found {list(values)} beside 'file_name', expected shares from 0 to 1")
    width, height = picture_size(located(picture, origin.path.parent))
    return [one * width, two * height, three * width, four * height]
