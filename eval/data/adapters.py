"""Readers of public data sets in the files in which they are published: each brings a row into the form of `Question`.

The answers of the test splits of DocVQA, InfographicVQA, TextVQA, MMMU and MathVista are not public.
"""

import functools
import io
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from eval.data import fields, rows
from eval.data.fields import Fields
from eval.data.questions import Origin, Question
from eval.metrics.mmmu import domain_of, subject_of
from eval.metrics.points import platform_and_kind
from glm4v_jax.config.checks import fits
from glm4v_jax.data.media import MediaItem, image_size, located
from glm4v_jax.errors import DataError, not_there
from glm4v_jax.inputs.media.load import open_image

Reader = Callable[[Fields, Origin], Iterator[Question]]
"""(row, where it stands) -> its questions; raises `DataError` that names the field, but not the place."""


def _file(origin: Origin, field: str, names: Sequence[str], folders: Sequence[str]) -> str:
    """Find the file of a row that is named without its folder; return its path relative to the data file.

    `names` are tried in this order in every folder. DataError, which names `field`, if there is no such file.
    """
    for folder in folders:
        for name in names:
            path = os.path.normpath(os.path.join(folder, name))
            if (origin.path.parent / path).is_file():
                return path
    places = ", ".join(os.path.normpath(origin.path.parent / folder) for folder in folders)
    raise DataError(not_there(names[0], f"it in one of {places}", field))


def _image(row: Fields, origin: Origin, field: str, folders: Sequence[str], suffix: str = "") -> MediaItem:
    """Return the image of a row: in its "image", or else in the file that another field names."""
    if row.get("image") is not None:
        return fields.media(row, "image", "image")
    name = fields.identifier(row, field, "image") + suffix
    return {"type": "image", "path": _file(origin, field, [name], folders)}


_CHARTQA_TYPES = ("human", "augmented")


def _chartqa(row: Fields, origin: Origin) -> Iterator[Question]:
    """Read ChartQA.

    - As published (https://github.com/vis-nlp/ChartQA): test_human.json and test_augmented.json with "imgname",
      "query" and "label", the images in png/ beside them.
    - lmms-lab's Parquet: "image", "question", "answer", "type" ("human_test", "augmented_test").
    - HuggingFaceM4's Parquet: "image", "query", "label", a list, "human_or_machine", 0 or 1.
    """
    image = _image(row, origin, "imgname", ["png", "."])
    question = fields.text(row, "question", "query")
    if row.get("human_or_machine") is not None:
        number = row["human_or_machine"]
        if number not in (0, 1):
            raise fields.invalid("human_or_machine", number, "0 or 1")
        kind = _CHARTQA_TYPES[int(number)]
    else:
        named = fields.text(row, "type") if row.get("type") is not None else origin.path.stem
        if not (kinds := [kind for kind in _CHARTQA_TYPES if kind in named]):
            raise fields.invalid("type or the file's name", named, "human or augmented in one of them")
        kind = kinds[0]
    reference = {"answers": fields.texts(row, "answer", "label"), "type": kind}
    yield Question(origin.name, {"question": question}, reference, [image], kind)


_DOCVQA_FOLDERS = [
    f"{above}{folder}"
    for above in ("", "../")
    for folder in (".", "documents", "images", "spdocvqa_images", "infographicsvqa_images")
]


def _docvqa(row: Fields, origin: Origin) -> Iterator[Question]:
    """Read DocVQA and InfographicVQA.

    - As published (https://rrc.cvc.uab.es/?ch=17): a JSON object whose "data" has "questionId", "question", "answers"
      and "image" ("documents/pybv0228_81.png") or "image_local_name"; images lie in a folder beside the file or beside
      the file's folder.
    - lmms-lab's Parquet: the same fields, with the images in "image".
    """
    name, value = fields.first(row, "image", "image_local_name")
    if isinstance(value, str):
        file = fields.text(row, name)
        image = {"type": "image", "path": _file(origin, name, [file, file.rsplit("/", 1)[-1]], _DOCVQA_FOLDERS)}
    else:
        image = fields.media(row, "image", name)
    reference = {"answers": fields.texts(row, "answers"), **fields.present(row, "question_types")}
    question = {"question": fields.text(row, "question")}
    yield Question(fields.identifier(row, "questionId", "question_id"), question, reference, [image])


def _mathvista(row: Fields, origin: Origin) -> Iterator[Question]:
    """Read MathVista.

    - As published (https://github.com/lupantech/MathVista): testmini.json, an object of objects with "pid", "question",
      "image" ("images/1.jpg"), "choices", "unit", "precision", "answer", "question_type" ("multi_choice", "free_form"),
      "answer_type" ("text", "integer", "float", "list"), "metadata"; images in images/ beside it.
    - Parquet of AI4Math/MathVista: the same fields, the image in "decoded_image", and "query", the whole prompt.
    """
    kind = fields.one_of(row, "question_type", ("multi_choice", "free_form"))
    options = fields.options(row, "choices") if row.get("choices") else {}
    answer = fields.identifier(row, "answer")
    if kind == "multi_choice" and not options:
        raise DataError("choices: found none for multi_choice; expected a list of texts")
    if kind == "multi_choice" and answer not in options.values():
        raise fields.invalid("answer", answer, "one of the choices")
    metadata = row.get("metadata")
    metadata = metadata if isinstance(metadata, Mapping) else {}
    reference: dict[str, Any] = {
        "answer": answer,
        "type": kind,
        "options": options or None,
        **fields.present(row, "answer_type", "precision"),
        **fields.present(metadata, "task", "skills", "category", "context", "grade"),
    }
    question = {
        "question": fields.text(row, "question"),
        "options": options,
        "unit": row.get("unit") or "",
        **fields.present(row, "query", "answer_type", "precision"),
    }
    image = fields.media(row, "image", "decoded_image", "image")
    task = metadata.get("task")
    group = task if isinstance(task, str) else None
    yield Question(fields.identifier(row, "pid"), question, reference, [image], group)


_MMMU_MOST_IMAGES = 7


def _mmmu(row: Fields, origin: Origin) -> Iterator[Question]:
    """Read MMMU in Parquet, of MMMU/MMMU (a folder for each subject) or lmms-lab/MMMU (a file for each split).

    Fields: "id" ("validation_Accounting_1"), "question" and "options" with `<image 1>` where an image belongs,
    "image_1" to "image_7", "question_type" ("multiple-choice" or "open"), "answer"; "options", and several answers of
    an open question, as a Python list in text. An image that is mentioned twice is shown twice, as in VLMEvalKit; one
    that is not mentioned is not shown, unless none is.
    """
    name = fields.identifier(row, "id")
    kind = fields.one_of(row, "question_type", ("multiple-choice", "open"))
    reference: dict[str, Any] = {"id": name, "type": kind}
    options: dict[str, str] = {}
    if kind == "open":
        reference["answers"] = fields.texts(row, "answer", is_literal=True)
    else:
        options = fields.options(row, "options")
        reference |= {"options": options, "answer": fields.one_of(row, "answer", list(options))}
    reference["subject"] = subject_of(reference)
    images: list[MediaItem] = []
    # Up to the first that is missing: `<image 2>` is the second.
    while len(images) < _MMMU_MOST_IMAGES and row.get(field := f"image_{len(images) + 1}") is not None:
        images.append(fields.media(row, "image", field))
    question = {"question": fields.text(row, "question"), "options": options}
    yield Question(name, question, reference, images, domain_of(reference), is_marked=True)


def _ocrbench(row: Fields, origin: Origin) -> Iterator[Question]:
    """Read OCRBench.

    - As published (https://github.com/Yuliang-Liu/MultimodalOCR): OCRBench.json, a list with "id", "dataset_name",
      "image_path", "question", "answers" (a text or a list) and "type"; images in OCRBench_Images/. The field names are
      those that lmms-eval reads; the file itself was not at hand.
    - Parquet of echo840/OCRBench: "dataset", "question", "question_type", "answer" (a list), "image".
    - TSV of VLMEvalKit: "index", "image" as base64, "question", "answer" as a Python list, "category".
    """
    image = _image(row, origin, "image_path", ["OCRBench_Images", ".", "images"])
    kind = fields.text(row, "question_type", "type", "category")
    is_tsv = origin.path.suffix.lower() == ".tsv"
    reference = {"answers": fields.texts(row, "answers", "answer", is_literal=is_tsv), "type": kind}
    dataset = row.get("dataset") or row.get("dataset_name")
    if isinstance(dataset, str):
        reference["dataset"] = dataset
    question = {"question": fields.text(row, "question").strip()}
    yield Question(origin.name, question, reference, [image], kind)


def _refcoco(row: Fields, origin: Origin) -> Iterator[Question]:
    """Read RefCOCO, RefCOCO+ and RefCOCOg in the Parquet files of lmms-lab (datasets/lmms-lab/RefCOCO).

    Fields: "question_id", "image", "bbox" [x, y, width, height] in pixels, "answer": the expressions that mean the
    object; its "question" asks for a caption and is not used. Every expression is a question of its own, as in
    lmms-eval. The split is the file's: "testA" of testA-00000-of-00001.parquet.
    """
    x, y, width, height = fields.box(row, "bbox")
    if width <= 0 or height <= 0:
        raise DataError(f"bbox: found width {width:g} and height {height:g}; expected numbers above 0")
    image = fields.media(row, "image", "image")
    name = fields.identifier(row, "question_id")
    reference = {"boxes": [[x, y, x + width, y + height]], "split": origin.split}
    for number, expression in enumerate(fields.texts(row, "answer")):
        yield Question(f"{name}:{number}", {"question": expression}, reference, [image], origin.split)


def _screenspot(row: Fields, origin: Origin) -> Iterator[Question]:
    """Read ScreenSpot and ScreenSpot-v2.

    - As published (https://github.com/njucckevin/SeeClick): screenspot_web.json and others, lists with "img_filename",
      "bbox" [x, y, width, height] in pixels, "instruction", "data_type" ("text", "icon"), "data_source" ("ios",
      "windows", "shop", ...); images in screenspot_imgs/ or screenspotv2_image/ beside the file.
    - Parquet of rootsautomation/ScreenSpot: "image", "file_name", the same other fields, but "bbox" [x1, y1, x2, y2] as
      fractions from 0 to 1, which is how lmms-eval compares it.
    - TSV of VLMEvalKit: as the first, with "image" as base64 and the instruction as "question".

    VLMEvalKit takes x + width - 1 for the right edge, which belongs to the box; here it is x + width.
    """
    image = _image(row, origin, "img_filename", ["screenspot_imgs", "screenspotv2_image", "images", "."])
    one, two, three, four = values = fields.box(row, "bbox")
    if row.get("file_name") is None:
        box = [one, two, one + three, two + four]
    elif 0 <= min(values) <= max(values) <= 1:
        width, height = image_size(located(image, origin.path.parent))
        box = [one * width, two * height, three * width, four * height]
    else:
        raise fields.invalid("bbox", values, "fractions from 0 to 1, as the row has 'file_name'")
    kind, source = fields.text(row, "data_type"), fields.text(row, "data_source")
    reference = {"boxes": [box], "data_type": kind, "data_source": source}
    question = {"question": fields.text(row, "instruction", "question")}
    yield Question(origin.name, question, reference, [image], platform_and_kind(reference))


def _textvqa(row: Fields, origin: Origin) -> Iterator[Question]:
    """Read TextVQA.

    - As published (https://textvqa.org/dataset): TextVQA_0.5.1_val.json, an object whose "data" has "question_id",
      "image_id", "question" and ten "answers"; images, named by "image_id", are beside it in train_images/ or
      train_val_images/train_images/.
    - lmms-lab's Parquet: the same fields, with the images in "image", and "ocr_tokens".
    """
    image = _image(row, origin, "image_id", ["train_images", "train_val_images/train_images", "images", "."], ".jpg")
    tokens = fields.texts(row, "ocr_tokens") if row.get("ocr_tokens") else []
    question = {"question": fields.text(row, "question"), "ocr_tokens": tokens}
    reference = {"answers": fields.texts(row, "answers")}
    yield Question(fields.identifier(row, "question_id"), question, reference, [image])


_OMNIDOCBENCH = {"text": (None, "text"), "table": ("table", "html"), "formula": ("equation_isolated", "latex")}
"""Kind of block -> the "category_type" it has, any for text, and the field with what it says."""


def _omnidocbench(row: Fields, origin: Origin, kind: str) -> Iterator[Question]:
    """Read the blocks of a page of OmniDocBench, each cut out of it, as its evaluation of single modules does.

    As published (https://huggingface.co/datasets/opendatalab/OmniDocBench): OmniDocBench.json, a list with "page_info"
    ("image_path", "page_attribute") and "layout_dets", blocks with "category_type", "poly" (the corners, in pixels) and
    "text", "html" or "latex"; images in images/ beside it. The whole list was not at hand.
    """
    category, field = _OMNIDOCBENCH[kind]
    page = fields.first(row, "page_info")[1]
    if not isinstance(page, Mapping):
        raise fields.invalid("page_info", page, "an object")
    blocks = [block for block in fields.items_of(row, "layout_dets") if isinstance(block, Mapping) and block.get(field)]
    blocks = [block for block in blocks if category in (None, block.get("category_type"))]
    if not blocks:
        return
    name = fields.text(page, "image_path").rsplit("/", 1)[-1]
    path = origin.path.parent / _file(origin, "page_info.image_path", [name], ["images", "."])
    attributes = page.get("page_attribute")
    group = attributes.get("data_source") if isinstance(attributes, Mapping) else None
    with open_image(path) as image:
        pixels = image.convert("RGB")
    for number, block in enumerate(blocks):
        reference = {"answer": fields.text(block, field), "page": name, **fields.present(block, "attribute")}
        cut = io.BytesIO()  # of 20,000 blocks, pixels would not fit into memory
        pixels.crop(_corners(block)).save(cut, "PNG")
        media: MediaItem = {"type": "image", "image": cut.getvalue()}
        identifier = f"{name}:{block.get('anno_id', number)}"
        yield Question(identifier, {"question": ""}, reference, [media], group if isinstance(group, str) else None)


def _corners(block: Fields) -> tuple[int, int, int, int]:
    """The box (left, top, right, bottom) of a block, in whole pixels, at least one each way."""
    poly = fields.first(block, "poly")[1]
    if not isinstance(poly, list) or len(poly) != 8 or not all(fits(one, float) for one in poly):
        raise fields.invalid("poly", poly, "eight numbers")
    (left, right), (top, bottom) = sorted((poly[0], poly[2])), sorted((poly[1], poly[5]))
    return round(left), round(top), max(round(right), round(left) + 1), max(round(bottom), round(top) + 1)


_VIDEOMME_FOLDERS = [f"{above}{folder}" for above in ("", "../") for folder in ("data", "video", "videos", ".")]
_VIDEOMME_SUFFIXES = (".mp4", ".MP4", ".mkv", ".webm")
_LETTER = re.compile(r"\s*([A-Z])[.)]\s*")


def _videomme(row: Fields, origin: Origin) -> Iterator[Question]:
    """Read Video-MME in the Parquet file of lmms-lab/Video-MME (videomme/test-00000-of-00001.parquet).

    Fields: "videoID", "question_id", "duration" ("short", "medium", "long"), "domain", "sub_category", "task_type",
    "question", "options" ("A. Apples.", ...), "answer". The videos come as zip archives; unpacked, VIDEOID.mp4 is
    looked for in data/, video/ and videos/, beside the file or beside its folder. Without subtitles.
    """
    name = fields.text(row, "videoID")
    path = _file(origin, "videoID", [f"{name}{suffix}" for suffix in _VIDEOMME_SUFFIXES], _VIDEOMME_FOLDERS)
    options = _without_letters(fields.options(row, "options"))
    reference = {
        "options": options,
        "answer": fields.one_of(row, "answer", list(options)),
        "subtitles": False,
        **fields.present(row, "duration", "domain", "sub_category", "task_type"),
    }
    question = {"question": fields.text(row, "question"), "options": options}
    video = {"type": "video", "path": path}
    yield Question(fields.identifier(row, "question_id"), question, reference, [video], reference.get("duration"))


def _without_letters(options: dict[str, str]) -> dict[str, str]:
    """Options without the letter that their text begins with, if each begins with its own."""
    matches = {letter: _LETTER.match(text) for letter, text in options.items()}
    if all(match is not None and match[1] == letter for letter, match in matches.items()):
        return {letter: _LETTER.sub("", text, count=1) for letter, text in options.items()}
    return options


READERS: Mapping[str, Reader] = {
    "rows": rows.read,
    "images": functools.partial(rows.read, is_question_needed=False),
    "chartqa": _chartqa,
    "docvqa": _docvqa,
    "mathvista": _mathvista,
    "mmmu": _mmmu,
    "ocrbench": _ocrbench,
    **{f"omnidocbench-{kind}": functools.partial(_omnidocbench, kind=kind) for kind in _OMNIDOCBENCH},
    "refcoco": _refcoco,
    "screenspot": _screenspot,
    "textvqa": _textvqa,
    "videomme": _videomme,
}
"""Reader of a task -> the function that reads its rows: our own, and those of public data sets."""
