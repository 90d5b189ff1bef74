"""Public data sets in the layouts in which they are published: each to items, and these to the scores of answers.

The rows are made up; the fields, their types and the places of files are those of the published data.
"""

import base64
import csv
import json

import pytest

from eval.metrics import METRICS
from eval.read_items import read_items
from eval.tasks import find_task
from glm4v_jax.data.media import image_size
from glm4v_jax.errors import DataError
from tests.eval.helpers_eval import png

pa = pytest.importorskip("pyarrow")
import pyarrow.parquet  # noqa: E402

IMAGE = {"bytes": png(), "path": "picture.png"}
"""As tables of Hugging Face hold it."""
BASE64 = base64.b64encode(png()).decode()


def put(path, *rows, content=None):
    """Write a file: bytes, or rows in the format of its suffix."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".parquet":
        pyarrow.parquet.write_table(pa.Table.from_pylist(list(rows)), path)
    elif path.suffix == ".tsv":
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]), delimiter="\t")
            writer.writeheader()
            writer.writerows(rows)
    elif path.suffix == ".json":
        path.write_text(json.dumps(content or list(rows)))
    else:
        path.write_bytes(content)
    return path


def text_of(answer):
    return f"<think>Hm, 7 or [[1,2,3,4]].</think><answer><|begin_of_box|>{answer}<|end_of_box|></answer>"


def check(name, path, right, wrong="nothing of it", count=1, index=0):
    """Check that of the item of a task at `index` right answers score 1 and the wrong one 0; return the item."""
    task = find_task(name)
    items = read_items(task, [path])
    assert len(items) == count
    item, metric = items[index], METRICS[task.metric]
    for answer in right:
        assert metric.score(text_of(answer), item.reference).value == 1.0, answer
    assert metric.score(text_of(wrong), item.reference).value == 0.0
    figures = metric.aggregate([(one.reference, metric.score(text_of(right[0]), one.reference)) for one in items])
    assert 0 < figures["score"] <= 1
    json.dumps([item.asked, dict(item.reference)])
    return item


def kinds(item):
    return [part["type"] for part in item.messages[-1]["content"]]


REFCOCO = {
    "question_id": "1719310", "image": IMAGE, "question": "Please carefully observe the area circled in the image",
    "answer": ["guy in yellow", "left <man>"], "segmentation": [1.0, 2.0], "bbox": [20.0, 10.0, 60.0, 50.0],
    "iscrowd": 0, "file_name": "COCO_train2014_000000000072_0.jpg",
}  # fmt: skip


def test_refcoco(tmp_path):
    path = put(tmp_path / "data" / "testA-00000-of-00001.parquet", REFCOCO)
    item = check("refcoco", path, ["[[100,100,400,600]]", "(100, 100, 400, 600)"], "[[500,0,900,600]]", 2, 1)
    assert item.reference == {"width": 200, "height": 100, "boxes": [[20, 10, 80, 60]], "split": "testA"}
    assert (item.id, item.group, kinds(item)) == ("1719310:1", "testA", ["image", "text"])
    assert item.question.endswith("as per the given description. left <man>")
    check("refcoco@lmms-eval", path, ["[0.1, 0.1, 0.4, 0.6]"], "[0.5, 0, 0.9, 0.6]", 2)
    check("refcoco@vlmevalkit", path, ["[0.1, 0.1, 0.4, 0.6]", "[100, 100, 400, 600]"], "[0.5, 0, 0.9, 0.6]", 2)
    located = check("refcoco@locate", path, ["[[100,100,400,600]]"], count=2)
    assert "locate guy in yellow in the image" in located.question


def test_chartqa_as_published(tmp_path):
    image = put(tmp_path / "png" / "41699051005347.png", content=png())
    row = {"imgname": "41699051005347.png", "query": "How many items?", "label": "14"}
    path = put(tmp_path / "test_human.json", row)
    item = check("chartqa", path, ["14", "14.5"], "15")
    assert item.images == [str(image)]
    assert (item.id, item.group, item.reference["type"]) == ("test_human:0", "human", "human")
    assert item.question == "How many items?\nAnswer the question with a single word."
    asked = item.asked["content"][0]
    assert len(asked.pop("digest")) == 16 and asked == {"type": "image", "path": "png/41699051005347.png"}
    listed = put(tmp_path / "test_augmented.json", {**row, "label": "[2014, 2015]"})
    assert check("chartqa@vlmevalkit", listed, ["[2014, 2015]"], "2014").group == "augmented"
    assert len(read_items(find_task("chartqa"), [path, listed])) == 2


def test_chartqa_in_tables(tmp_path):
    lmms = {"type": "augmented_test", "question": "Share?", "answer": "0.57", "image": IMAGE}
    assert check("chartqa", put(tmp_path / "lmms.parquet", lmms), ["0.57", "57%"], "0.7").group == "augmented"
    m4 = {"image": IMAGE, "query": "Who?", "label": ["Inspired"], "human_or_machine": 0}
    assert check("chartqa", put(tmp_path / "m4.parquet", m4), ["inspired"]).group == "human"


DOCVQA = {
    "questionId": 49153, "question": "What is the ‘actual’ value per 1000?", "question_types": ["figure/diagram"],
    "image": "documents/pybv0228_81.png", "docId": 14465, "ucsf_document_id": "pybv0228",
    "ucsf_document_page_no": "81", "answers": ["0.28", "0.280"], "data_split": "val",
}  # fmt: skip


@pytest.mark.parametrize("folder", ["qas/documents", "spdocvqa_images", "qas"])
def test_docvqa_as_published(tmp_path, folder):
    put(tmp_path / folder / "pybv0228_81.png", content=png())
    content = {"dataset_name": "SP-DocVQA", "dataset_version": "1.0", "dataset_split": "val", "data": [DOCVQA]}
    path = put(tmp_path / "qas" / "val_v1.0_withQT.json", content=content)
    item = check("docvqa", path, ["0.28", "0.280"], "1.75")
    assert (item.id, item.place, kinds(item)) == ("49153", f"{path}: data[0]", ["image", "text"])
    check("docvqa@harness", path, ["0.28"], "1.75")


def test_docvqa_in_tables(tmp_path):
    row = {**DOCVQA, "questionId": "49153", "image": IMAGE}
    check("docvqa", put(tmp_path / "validation-00000-of-00006.parquet", row), ["0.28"])
    check("infovqa", put(tmp_path / "infovqa.parquet", row), ["0.28"])
    twice = put(tmp_path / "twice.parquet", row, {**row, "questionId": "49154"})
    first, second = read_items(find_task("docvqa"), [twice])
    assert first.images[0] is second.images[0]  # in memory once


TEXTVQA = {
    "question_id": 34602, "question": "what is the Brand of this camera?", "image_id": "003a8ae2ef43b901",
    "image_classes": ["Cassette deck"], "set_name": "val",
    "answers": ["nous les gosses", "dakota", "clos culombu", "dakota digital", *["dakota"] * 6],
}  # fmt: skip


def test_textvqa(tmp_path):
    path = put(tmp_path / "TextVQA_0.5.1_val.json", content={"dataset_type": "val", "data": [TEXTVQA]})
    with pytest.raises(DataError, match=r"data\[0\]: image_id: found 003a8ae2ef43b901\.jpg, no such file"):
        read_items(find_task("textvqa"), [path])
    put(tmp_path / "train_images" / "003a8ae2ef43b901.jpg", content=png())
    item = check("textvqa", path, ["Dakota.", "the dakota"], "nous")
    assert (item.id, item.question.split("\n")[0]) == ("34602", "what is the Brand of this camera?")
    table = put(tmp_path / "val.parquet", {**TEXTVQA, "image": IMAGE, "ocr_tokens": ["DAKOTA"]})
    assert check("textvqa@lmms-eval", table, ["dakota"]).question.startswith("What is the brand of this camera?\nAns")
    check("textvqa@vlmevalkit", table, ["dakota"])


REGULAR, FORMULA = "Regular Text Recognition", "Handwritten Mathematical Expression Recognition"
ASKED = "what is written in the image? "


def test_ocrbench_in_parquet(tmp_path):
    rows = [
        {"dataset": "IIIT5K", "question": ASKED, "question_type": REGULAR, "answer": ["CENTRE"], "image": IMAGE},
        {"dataset": "HME100k", "question": "?", "question_type": FORMULA, "answer": ["x ^ 2"], "image": IMAGE},
    ]
    path = put(tmp_path / "test-00000-of-00001.parquet", *rows)
    item = check("ocrbench", path, ["CENTRE", "The word is centre."], "center", 2)
    assert (item.question, item.group, item.reference["dataset"]) == (ASKED.strip(), REGULAR, "IIIT5K")
    check("ocrbench", path, ["x^2"], "X^2", 2, 1)
    check("ocrbench@lmms-eval", path, ["ＣＥＮＴＲＥ"], "center", 2)


def test_blocks_of_omnidocbench_are_cut_out_of_their_page(tmp_path):
    put(tmp_path / "images" / "page.png", content=png(200, 100))

    def block(category, left, top, right, bottom, **answer):
        poly = [left, top, right, top, right, bottom, left, bottom]
        return {"category_type": category, "poly": poly, "ignore": False, "anno_id": left, **answer}

    table = "<table><tr><td>A</td><td>B</td></tr></table>"
    blocks = [
        block("text_block", 10.0, 20.0, 60.4, 40.0, text="Invoice 12.", attribute={"text_language": "text_en"}),
        block("title", 5, 5, 50, 15, text="Bill"),
        block("table", 0, 50, 100, 90, html=table, latex="x"),
        block("equation_isolated", 100, 50, 180, 60, latex="$$ x^2 $$"),
        block("figure", 0, 0, 10, 10),
    ]
    page = {"image_path": "images/page.png", "width": 200, "height": 100, "page_attribute": {"data_source": "book"}}
    path = put(tmp_path / "OmniDocBench.json", {"layout_dets": blocks, "page_info": page, "extra": {}})
    item = check("omnidocbench-text", path, ["Invoice 12.", "Invoice, 12"], "#", 2)
    assert (item.id, item.group, item.question) == ("page.png:10.0", "book", "Text Recognition:")
    assert [image_size({"image": image}) for image in item.images] == [(50, 20)]
    item = check("omnidocbench-table", path, [table, table.replace("td>", "th>")], "A B")
    assert image_size({"image": item.images[0]}) == (100, 40) and item.question == "Table Recognition:"
    check("omnidocbench-formula", path, ["x^2", r"\[ x^2 \]"], "-")
    with pytest.raises(DataError, match=r"bad.json\[0\]: poly: found \[1\]; expected eight numbers"):
        bad = {"layout_dets": [{"text": "a", "poly": [1]}], "page_info": page}
        read_items(find_task("omnidocbench-text"), [put(tmp_path / "bad.json", bad)])


def test_ocrbench_in_json_and_tsv(tmp_path):
    put(tmp_path / "OCRBench_Images" / "IIIT5K" / "5.png", content=png())
    row = {"id": 0, "dataset_name": "IIIT5K", "image_path": "IIIT5K/5.png", "question": ASKED, "answers": "CENTRE"}
    path = put(tmp_path / "OCRBench.json", {**row, "type": REGULAR})
    assert check("ocrbench", path, ["centre"]).id == "OCRBench:0"
    row = {"index": 0, "image": BASE64, "question": ASKED, "answer": "['CENTRE', '[1]']", "category": REGULAR}
    item = check("ocrbench", put(tmp_path / "OCRBench.tsv", row), ["centre", "[1]"], "center")
    assert item.images == [f"data:image/unknown;base64,{BASE64}"]


MMMU = {
    "id": "validation_Accounting_1", "question": "<image 1> Baxter Company has <image 2>. Which?",
    "options": "['$6', '$7 <image 1>', 'it\\'s $8']", "explanation": "", "image_1": IMAGE,
    "image_2": {"bytes": png(colour="red"), "path": "picture.png"}, "image_3": None, "img_type": "['Tables']",
    "answer": "B", "topic_difficulty": "Medium", "question_type": "multiple-choice",
    "subfield": "Managerial Accounting",
}  # fmt: skip
MMMU_OPEN = {
    **MMMU, "id": "validation_Art_Theory_12", "question": "How long?", "options": "[]", "answer": "['16', 'sixteen']",
    "question_type": "open",
}  # fmt: skip


def test_mmmu(tmp_path):
    path = put(tmp_path / "validation-00000-of-00001.parquet", MMMU, MMMU_OPEN)
    item = check("mmmu", path, ["B", "(B)"], "A", 2)
    assert kinds(item) == ["image", "text", "image", "text", "image", "text"]
    first, second, again = item.images
    assert first == again != second
    assert item.group == "Business"
    assert item.reference["options"] == {"A": "$6", "B": "$7 <image 1>", "C": "it's $8"}
    assert item.question.endswith("\nC. it's $8\n\nAnswer with the option's letter from the given choices directly.")
    item = check("mmmu", path, ["16", "the answer is sixteen"], "17", 2, 1)
    assert (item.group, item.reference["subject"]) == ("Art and Design", "Art_Theory")
    assert kinds(item) == ["image", "image", "text"]
    assert item.question == "How long?\n\nAnswer the question using a single word or phrase."
    assert "Options:\nA. $6" in check("mmmu@vlmevalkit", path, ["B"], "C", 2).question


def test_screenspot_as_published(tmp_path):
    row = {
        "img_filename": "web_3b0a.png", "bbox": [20, 10, 60, 50], "instruction": "view the details of the item",
        "data_type": "text", "data_source": "shop",
    }  # fmt: skip
    put(tmp_path / "screenspot_imgs" / "web_3b0a.png", content=png())
    path = put(tmp_path / "screenspot_web.json", row)
    item = check("screenspot", path, ["[[100,100,400,600]]", "[250, 350]", "(400, 600)"], "[401, 350]")
    assert (item.id, item.group) == ("screenspot_web:0", "web-text")
    assert item.reference["boxes"] == [[20, 10, 80, 60]]
    item = check("screenspot@vlmevalkit", path, ["pyautogui.click(x=20, y=35)"], "pyautogui.click(x=250, y=35)")
    assert [message["role"] for message in item.messages] == ["system", "user"]
    mobile = put(tmp_path / "mobile.json", {**row, "data_source": "ios", "data_type": "icon"})
    assert read_items(find_task("screenspot"), [mobile])[0].group == "mobile-icon"


SCREENSPOT = {
    "file_name": "pc_0a.png", "bbox": [0.1, 0.1, 0.4, 0.6], "instruction": "close", "data_type": "icon",
    "data_source": "windows", "image": IMAGE,
}  # fmt: skip


def test_screenspot_in_tables(tmp_path):
    path = put(tmp_path / "test-00000-of-00002.parquet", SCREENSPOT)
    item = check("screenspot", path, ["[[100,100,400,600]]"], "[700, 350]")
    assert item.reference["boxes"] == [pytest.approx([20, 10, 80, 60])]
    assert item.group == "desktop-icon"
    check("screenspot@lmms-eval", path, ["(0.10, 0.10, 0.40, 0.60)"], "(0.7, 0.1, 0.8, 0.6)")
    row = {"index": 0, "image": BASE64, "question": "close", "bbox": "[20, 10, 60, 50]"}
    check("screenspot", put(tmp_path / "s.tsv", {**row, "data_type": "text", "data_source": "shop"}), ["[250, 350]"])


@pytest.mark.parametrize("place", ["data/fFjv93ACGo8.mp4", "videomme/videos/fFjv93ACGo8.MP4"])
def test_videomme(tmp_path, place):
    row = {
        "video_id": "001", "duration": "short", "domain": "Knowledge", "sub_category": "Humanity & History",
        "url": "https://www.youtube.com/watch?v=fFjv93ACGo8", "videoID": "fFjv93ACGo8", "question_id": "001-1",
        "task_type": "Counting Problem", "question": "Which of the following features are not discussed?",
        "options": ["A. Apples.", "B. Candles.", "C. Berries.", "D. The three are of the same number."],
        "answer": "C",
    }  # fmt: skip
    path = put(tmp_path / "videomme" / "test-00000-of-00001.parquet", row)
    with pytest.raises(DataError, match=r"parquet\[0\]: videoID: found fFjv93ACGo8\.mp4, no such file"):
        read_items(find_task("videomme"), [path])
    put(tmp_path / place, content=b"")
    item = check("videomme", path, ["C", "Berries."], "B")
    assert (item.id, item.group, kinds(item)) == ("001-1", "short", ["video", "text"])
    assert item.reference["options"]["C"] == "Berries."
    assert "\nC. Berries.\nD. The three" in item.question
    check("videomme@vlmevalkit", path, ["C"], "B")
    check("videomme@lmms-eval", path, ["C"], "B")


MATHVISTA = {
    "pid": "1", "question": "Find the length.", "image": "images/1.jpg", "choices": None, "unit": "cm",
    "precision": 1.0, "answer": "1.2", "question_type": "free_form", "answer_type": "float",
    "metadata": {"category": "math-targeted-vqa", "task": "geometry problem solving", "skills": ["geometry reasoning"]},
}  # fmt: skip
MATHVISTA_CHOICE = {
    **MATHVISTA, "pid": "2", "choices": ["145°", "35°"], "unit": None, "precision": None, "answer": "145°",
    "question_type": "multi_choice", "answer_type": "text",
}  # fmt: skip


def test_mathvista_in_parquet(tmp_path):
    extra = {"decoded_image": IMAGE, "query": "Hint: Please answer.\nQuestion: Find the length."}
    path = put(tmp_path / "testmini.parquet", {**MATHVISTA, **extra, "choices": []}, {**MATHVISTA_CHOICE, **extra})
    item = check("mathvista", path, ["1.2", "1.23"], "1.3", 2)
    assert (item.id, item.group, item.question) == ("1", "geometry problem solving", extra["query"])
    check("mathvista", path, ["A", "145°"], "B", 2, 1)
    check("mathvista@official", path, ["A", "(A)"], "B", 2, 1)


def test_mathvista_as_published(tmp_path):
    put(tmp_path / "images" / "1.jpg", content=png())
    path = put(tmp_path / "testmini.json", content={"1": MATHVISTA, "2": MATHVISTA_CHOICE})
    item = check("mathvista@format", path, ["1.2"], "1.3", 2)
    assert item.question == (
        "Find the length. (Unit: cm)\nAnswer the question using a single floating-point number with one decimal place."
    )
    item = check("mathvista@format", path, ["A"], "B", 2, 1)
    assert item.question.startswith("Find the length.\nA. 145°\nB. 35°\nAnswer with the option's letter")
    with pytest.raises(ValueError, match=r"testmini\.json: '1': prompt: found an error \('query' is undefined\)"):
        read_items(find_task("mathvista"), [path])


@pytest.mark.parametrize(
    ("name", "row", "change", "message"),
    [
        ("refcoco", REFCOCO, {"bbox": [1.0, 2.0, 0.0, 3.0]}, r"bbox: found width 0 and height 3"),
        ("refcoco", REFCOCO, {"bbox": [1.0, 2.0, 3.0]}, r"bbox: found \[1.0, 2.0, 3.0\]; expected four"),
        ("refcoco", REFCOCO, {"answer": []}, r"answer: found an empty list"),
        ("refcoco", REFCOCO, {"image": {"bytes": b"GIF89a", "path": ""}}, "found no readable image"),
        ("mmmu", MMMU, {"answer": "D"}, r"answer: found 'D'; expected one of A, B, C"),
        ("mmmu", MMMU, {"options": "['$6"}, r"options: found \"\['\$6\"; expected a list"),
        ("mmmu", MMMU, {"question_type": "essay"}, r"question_type: found 'essay'; expected one of multiple"),
        ("mmmu", MMMU, {"image_2": None}, r"prompt: found <image 2> with 1 image in the row"),
        ("mathvista", MATHVISTA_CHOICE, {"choices": ["35°"]}, r"answer: found '145°'; expected one of the"),
        ("mathvista", MATHVISTA_CHOICE, {"choices": None}, r"choices: found none for multi_choice"),
        ("mathvista", MATHVISTA, {"question_type": "essay"}, r"question_type: found 'essay'"),
        ("docvqa", DOCVQA, {"image": IMAGE, "answers": None}, r"answers: found nothing"),
        ("screenspot", SCREENSPOT, {"bbox": [20.0, 10.0, 80.0, 60.0]}, r"bbox: found .*; expected fractions from 0"),
        ("textvqa", TEXTVQA, {"image": IMAGE, "answers": "dakota", "question": None}, r"question: found nothing"),
        ("chartqa", {"query": "?", "label": "1", "image": IMAGE}, {}, r"type or the file's name: found 'val'; exp"),
        ("chartqa", {"query": "?", "label": "1"}, {}, r"imgname or image: found nothing"),
        ("chartqa", {"image": IMAGE, "human_or_machine": 2}, {}, r"human_or_machine: found the number 2"),
    ],
)
def test_an_invalid_row_is_an_error_with_place_and_field(tmp_path, name, row, change, message):
    path = put(tmp_path / "val.parquet", {"decoded_image": IMAGE, "query": "?", **row, **change})
    with pytest.raises(ValueError, match=rf"val\.parquet\[0\]: .*{message}"):
        read_items(find_task(name), [path])
