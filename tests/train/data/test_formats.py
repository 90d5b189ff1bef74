"""Formats of training data, each as its project documents it, and invalid rows."""

import copy
import io
import itertools
import json
import re

import hypothesis
import hypothesis.strategies as st
import PIL.Image
import pytest

from glm4v_jax.errors import DataError
from glm4v_jax.generate.text.boxes import find_boxes, to_pixels
from train.data.formats import detect, read_row
from train.data.grounding import place_objects


def text(value):
    return {"type": "text", "text": value}


def image(path):
    return {"type": "image", "path": path}


def video(path):
    return {"type": "video", "path": path}


def turn(role, *items):
    return {"role": role, "content": [text(item) if isinstance(item, str) else item for item in items]}


def png(width, height):
    file = io.BytesIO()
    PIL.Image.new("RGB", (width, height)).save(file, "PNG")
    return file.getvalue()


@pytest.mark.parametrize("name", ["imgs", "image_path"])
@pytest.mark.parametrize("value", ["a.png", ["a.png", "b.png"], [{"bytes": b"", "path": None}]])
def test_files_in_a_field_that_is_not_read_are_an_error(name, value):
    row = {"instruction": "Name it.", "output": "cat.png", "id": "1.png", "source": "page1.png"}
    assert len(read_row(row, None).messages) == 2
    assert len(read_row({**row, name: value, "images": ["c.png"]}, None).messages) == 2
    with pytest.raises(
        DataError, match=f"{name}: found files in a field that is not read; expected them in one of images"
    ):
        read_row({**row, name: value}, None)


def test_an_answer_before_the_first_question_is_an_error():
    question, answer = {"from": "human", "value": "Which?"}, {"from": "gpt", "value": "7"}
    for turns in ([answer, question], [answer, question, answer]):
        with pytest.raises(DataError, match="conversations: found an answer before the first question"):
            read_row({"conversations": turns}, None)


def test_a_known_field_is_no_suggestion_for_itself():
    with pytest.raises(DataError, match=r"found the fields 'text'; expected .* completion$"):
        detect({"text": "only"})


# One row a format, as its project documents it.
LLAMA_FACTORY = {
    "messages": [
        {"role": "user", "content": "<image>Who are they?"},
        {"role": "assistant", "content": "They're Kane and Gretzka from Bayern Munich."},
        {"role": "user", "content": "What are they doing?<image>"},
        {"role": "assistant", "content": "They are celebrating on the soccer field."},
    ],
    "images": ["mllm_demo_data/1.jpg", "mllm_demo_data/2.jpg"],
}
LLAMA_FACTORY_VIDEO = {
    "messages": [
        {"content": "<video>Why is this video funny?", "role": "user"},
        {"content": "Because a baby is reading.", "role": "assistant"},
    ],
    "videos": ["mllm_demo_data/1.mp4"],
}
SHAREGPT = {
    "conversations": [
        {"from": "human", "value": "<image>\nWhat is it?"},
        {"from": "gpt", "value": "A cat."},
    ],
    "system": "You are terse.",
    "images": ["cat.png"],
}
LLAVA = {
    "id": "000000033471",
    "image": "coco/train2017/000000033471.jpg",
    "conversations": [
        {"from": "human", "value": "<image>\nWhat are the colors of the bus in the image?"},
        {"from": "gpt", "value": "The bus in the image is white and red."},
        {"from": "human", "value": "What feature can be seen on the back of the bus?"},
        {"from": "gpt", "value": "The back of the bus features an advertisement."},
    ],
}
ALPACA = {
    "instruction": "Describe it.<image>",
    "input": "In one word.",
    "output": "Cat",
    "system": "You are terse.",
    "history": [["Hello", "Hi"]],
    "images": ["cat.png"],
}
SWIFT = {
    "messages": [
        {"role": "system", "content": "You are a helpful assistant."},
        {"role": "user", "content": "<image>Find the <ref-object> in the image"},
        {"role": "assistant", "content": "<bbox><bbox>"},
    ],
    "images": ["/xxx/x.jpg"],
    "objects": {"ref": ["sheep"], "bbox": [[90.9, 160.8, 135, 212.8], [360.9, 480.8, 495, 532.8]]},
}
TRL = {
    "images": ["a.png"],
    "messages": [
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What color is it?"}]},
        {"role": "assistant", "content": [{"type": "text", "text": "It is blue."}]},
    ],
}
TRL_COMPLETION = {
    "image": "a.png",
    "prompt": [{"role": "user", "content": "What color is it?"}],
    "completion": [{"role": "assistant", "content": "It is blue."}],
}


def test_llama_factory_conversations_read():
    messages, losses, _ = read_row(LLAMA_FACTORY, "openai")
    assert messages == (
        turn("user", image("mllm_demo_data/1.jpg"), "Who are they?"),
        turn("assistant", "They're Kane and Gretzka from Bayern Munich."),
        turn("user", "What are they doing?", image("mllm_demo_data/2.jpg")),
        turn("assistant", "They are celebrating on the soccer field."),
    )
    assert losses == (False, True, False, True)
    messages, _, _ = read_row(LLAMA_FACTORY_VIDEO, "openai")
    assert messages[0] == turn("user", video("mllm_demo_data/1.mp4"), "Why is this video funny?")


def test_sharegpt_rows_read():
    messages, losses, _ = read_row(SHAREGPT, "sharegpt")
    assert messages == (
        turn("system", "You are terse."),
        turn("user", image("cat.png"), "\nWhat is it?"),
        turn("assistant", "A cat."),
    )
    assert losses == (False, False, True)


def test_a_system_message_in_the_conversation_wins():
    talk = [{"from": "system", "value": "Be long."}, *SHAREGPT["conversations"]]
    messages, losses, _ = read_row(SHAREGPT | {"conversations": talk}, "sharegpt")
    assert messages[0] == turn("system", "Be long.")
    assert [message["role"] for message in messages] == ["system", "user", "assistant"]
    assert losses == (False, False, True)


def test_developer_is_system():
    talk = [{"role": "developer", "content": "Be short."}, *LLAMA_FACTORY["messages"]]
    messages, losses, _ = read_row(LLAMA_FACTORY | {"messages": talk}, "openai")
    assert messages[0] == turn("system", "Be short.") and not losses[0]


def test_llava_rows_read():
    messages, losses, _ = read_row(LLAVA, "llava")
    assert messages[0] == turn(
        "user", image("coco/train2017/000000033471.jpg"), "\nWhat are the colors of the bus in the image?"
    )
    assert [message["role"] for message in messages] == ["user", "assistant"] * 2
    assert losses == (False, True) * 2


def test_alpaca_rows_read():
    messages, losses, _ = read_row(ALPACA, "alpaca")
    assert messages == (
        turn("system", "You are terse."),
        turn("user", "Hello"),
        turn("assistant", "Hi"),
        turn("user", "Describe it.", image("cat.png"), "\nIn one word."),
        turn("assistant", "Cat"),
    )
    assert losses == (False, False, True, False, True)
    assert read_row({"query": "Hello", "response": "Hi", "history": None}, "alpaca").messages == (
        turn("user", "Hello"),
        turn("assistant", "Hi"),
    )


def test_swift_boxes_become_thousandths_of_their_image():
    messages, _, _ = read_row(SWIFT, "swift", lambda item: {"/xxx/x.jpg": (600, 800)}[item["path"]])
    assert messages[1:] == (
        turn("user", image("/xxx/x.jpg"), "Find the sheep in the image"),
        # 90.9 / 600, 160.8 / 800, ...
        turn("assistant", "[152,201,225,266][602,601,825,666]"),
    )


def test_swift_points_from_0_to_1_need_no_image_size():
    row = {
        "messages": [
            {"role": "user", "content": "<image>Help me open Google Chrome"},
            {"role": "assistant", "content": "Action: click(start_box='<bbox>')"},
        ],
        "images": ["/xxx/x.jpg"],
        "objects": {"ref": [], "bbox": [[0.615, 0.226]], "bbox_type": "norm1"},
    }
    # The size of the image is not needed.
    assert read_row(row, "swift", None).messages[1] == turn("assistant", "Action: click(start_box='[615,226]')")


def test_swift_boxes_belong_to_the_image_of_their_id():
    row = {
        "messages": [
            {"role": "user", "content": "<image><image>Where?"},
            {"role": "assistant", "content": "<bbox> and <bbox>"},
        ],
        "images": ["a.png", "b.png"],
        "objects": {"ref": None, "bbox": [[10, 10, 20, 20], [10, 10, 20, 20]], "image_id": [1, 0]},
    }
    sizes = {"a.png": (100, 100), "b.png": (20, 40)}
    messages, _, _ = read_row(row, "swift", lambda item: sizes[item["path"]])
    assert messages[1] == turn("assistant", "[500,250,1000,500] and [100,100,200,200]")


@hypothesis.given(
    st.integers(1, 5000), st.integers(1, 5000), st.lists(st.floats(0, 1), min_size=4, max_size=4).map(sorted)
)
def test_boxes_survive_writing_and_parsing(width, height, shares):
    x1, x2, y1, y2 = shares
    box = [x1 * width, y1 * height, x2 * width, y2 * height]
    messages = [turn("user", image("a.png")), turn("assistant", "<|begin_of_box|>[<bbox>]<|end_of_box|>")]
    placed = place_objects(messages, {"bbox": [box]}, lambda item: (width, height))
    (found,) = find_boxes(placed[1]["content"][0]["text"])
    (pixels,) = to_pixels([found], width, height)
    # Half a thousandth of the side by rounding here, half a pixel there.
    assert all(
        abs(a - b) <= 0.5 + side / 2000 + 1e-6
        for a, b, side in zip(box, pixels, (width, height, width, height), strict=True)
    )
    assert messages[1] == turn("assistant", "<|begin_of_box|>[<bbox>]<|end_of_box|>")


def test_loss_and_weight_fields_choose_the_targets():
    row = {
        "messages": [
            {"role": "user", "content": "a", "loss": None},
            {"role": "assistant", "content": "b", "loss": False},
            {"role": "user", "content": "c", "loss": False},
            {"role": "assistant", "content": "d", "loss": True},
        ]
    }
    assert read_row(row, "openai").losses == (False, False, False, True)
    row["messages"][1] = {"role": "assistant", "content": "b", "weight": 0, "loss_scale": None}
    assert read_row(row, "openai").losses == (False, False, False, True)


def test_trl_rows_read():
    expected = (turn("user", image("a.png"), "What color is it?"), turn("assistant", "It is blue."))
    assert read_row(TRL, "hf").messages == expected
    assert read_row(TRL, "hf").losses == (False, True)
    assert read_row(TRL_COMPLETION, "hf").messages == expected
    assert read_row(TRL_COMPLETION, "hf").losses == (False, True)
    assert read_row({"prompt": "2 + 2?", "completion": "4"}, "hf").messages == (
        turn("user", "2 + 2?"),
        turn("assistant", "4"),
    )


def test_answers_in_a_prompt_do_not_contribute_to_the_loss():
    prompt = [turn("user", "a"), turn("assistant", "b"), turn("user", "c")]
    assert read_row({"prompt": prompt, "completion": [turn("assistant", "d")]}, "hf").losses == (
        False,
        False,
        False,
        True,
    )


def test_items_of_tables_may_have_null_fields_and_images_as_bytes():
    data = png(4, 4)
    empty = {"type": None, "text": None, "image": None}
    row = {
        "messages": [
            {"role": "user", "content": [empty | {"type": "image"}, empty | {"type": "text", "text": "?"}]},
            {"role": "assistant", "content": [empty | {"type": "text", "text": "!"}]},
        ],
        "images": [{"bytes": data, "path": "a.png"}],
    }
    assert read_row(row, "hf").messages[0] == turn("user", {"type": "image", "image": data}, "?")
    row["images"][0]["bytes"] = None
    assert read_row(row, "hf").messages[0] == turn("user", image("a.png"), "?")


@pytest.mark.parametrize(
    ("item", "expected"),
    [
        ({"type": "image", "image": "a.png"}, image("a.png")),
        ({"type": "image", "path": "a.png"}, image("a.png")),
        ({"type": "image", "url": "https://h/a.png"}, {"type": "image", "url": "https://h/a.png"}),
        ({"type": "image_url", "image_url": {"url": "https://h/a.png"}}, {"type": "image", "url": "https://h/a.png"}),
        ({"type": "image_url", "image_url": "HTTPS://h/a"}, {"type": "image", "url": "HTTPS://h/a"}),
        (
            {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": "QUJD"}},
            {"type": "image", "url": "data:image/png;base64,QUJD"},
        ),
        ({"type": "image", "source": {"type": "url", "url": "http://h/a"}}, {"type": "image", "url": "http://h/a"}),
        ({"type": "video", "video": "a.mp4"}, video("a.mp4")),
        (
            {"type": "video", "video": ["1.png", {"path": "2.png"}], "fps": 4},
            {"type": "video", "video": ["1.png", "2.png"], "fps": 4},
        ),
    ],
)
def test_typed_items_of_any_spelling_read_alike(item, expected):
    row = {"messages": [{"role": "user", "content": [item]}, {"role": "assistant", "content": "!"}]}
    assert read_row(row, "hf").messages[0] == turn("user", expected)


@pytest.mark.parametrize(
    ("row", "name"),
    [
        (LLAMA_FACTORY, "openai"),
        (LLAMA_FACTORY_VIDEO, "openai"),
        (SHAREGPT, "sharegpt"),
        (LLAVA, "llava"),
        (ALPACA, "alpaca"),
        ({"query": "a", "response": "b"}, "alpaca"),
        (SWIFT, "swift"),
        (TRL, "hf"),
        (TRL_COMPLETION, "hf"),
    ],
)
def test_formats_are_detected_by_their_fields(row, name):
    assert detect(row) == name


SHORT = (turn("user", "Hello"), turn("assistant", "Hi"))
SHOWN = (turn("user", image("a.png"), "What?"), turn("assistant", "!"))
OPENAI = [{"role": "user", "content": "What?"}, {"role": "assistant", "content": "!"}]
FROM_VALUE = [{"from": "human", "value": "What?"}, {"from": "gpt", "value": "!"}]
EMPTY = {"bytes": None, "path": None}
NOTHING = {"conversations": None, "tools": "[]", "audios": [], "system": None, "objects": None}

# Rows as people have them, which no format's documentation shows: how each is detected and read.
SHAPES = {
    # ms-swift puts what has no marker before the query, images before what markers refer to, videos before images.
    "no marker": ({"messages": OPENAI, "images": ["a.png"]}, "openai", SHOWN),
    "an image as text": ({"messages": OPENAI, "image": "a.png"}, "openai", SHOWN),
    "too few markers": (
        {"messages": [{"role": "user", "content": "Is it<image>?"}, OPENAI[1]], "images": ["a.png", "b.png"]},
        "openai",
        (turn("user", image("a.png"), "Is it", image("b.png"), "?"), SHOWN[1]),
    ),
    "a video and an image": (
        {"messages": [{"role": "system", "content": "Be short."}, *OPENAI], "images": ["a.png"], "videos": ["v.mp4"]},
        "openai",
        (turn("system", "Be short."), turn("user", video("v.mp4"), image("a.png"), "What?"), SHOWN[1]),
    ),
    "conversations without markers": ({"conversations": FROM_VALUE, "images": ["a.png"]}, "sharegpt", SHOWN),
    "LLaVA without a marker": ({"id": "7", "conversations": FROM_VALUE, "image": "a.png"}, "llava", SHOWN),
    "alpaca without a marker": (
        {"instruction": "What?", "input": "", "output": "!", "images": ["a.png"]},
        "alpaca",
        SHOWN,
    ),
    "query and response": ({"query": "What?", "response": "!", "image": "a.png"}, "alpaca", SHOWN),
    "typed items without one for the image": (
        {"messages": [turn("user", "What?"), turn("assistant", "!")], "images": ["a.png"]},
        "hf",
        SHOWN,
    ),
    "typed items with too few": (
        {"messages": [turn("user", {"type": "image"}, "What?"), turn("assistant", "!")], "images": ["b.png", "a.png"]},
        "hf",
        (turn("user", image("b.png"), image("a.png"), "What?"), SHOWN[1]),
    ),
    # Names that ms-swift takes for each other.
    "question and answer": ({"image": "a.png", "question": "What?", "answer": "!"}, "swift", SHOWN),
    "prompt and response": ({"images": ["a.png"], "prompt": "What?", "response": "!"}, "swift", SHOWN),
    "instruction and response": ({"images": ["a.png"], "instruction": "What?", "response": "!"}, "swift", SHOWN),
    "messages by from and value": ({"messages": FROM_VALUE, "images": ["a.png"]}, "swift", SHOWN),
    "conversations by role and content": ({"conversations": OPENAI, "images": ["a.png"]}, "swift", SHOWN),
    "conversation of pairs": (
        {"system": "Be short.", "conversation": [{"human": "What?", "assistant": "!"}], "images": ["a.png"]},
        "swift",
        (turn("system", "Be short."), *SHOWN),
    ),
    # The Cauldron and FineVision.
    "texts": (
        {"images": [{"bytes": b"abc", "path": None}], "texts": [{"user": "What?", "assistant": "!", "source": "x"}]},
        "finevision",
        (turn("user", {"type": "image", "image": b"abc"}, "What?"), SHOWN[1]),
    ),
    "texts in several turns": (
        {"images": ["a.png"], "texts": [{"user": "What?", "assistant": "!"}] * 2, "relevance_ratings": [5, 1]},
        "finevision",
        (*SHOWN, turn("user", "What?"), SHOWN[1]),
    ),
    # Nothing, as tables write it.
    "tools as an empty list": ({"messages": OPENAI, "images": ["a.png"], "tools": "[]"}, "openai", SHOWN),
    "an image that is null": ({"query": "Hello", "response": "Hi", "images": [None]}, "alpaca", SHORT),
    "an image that is an empty text": ({"query": "Hello", "response": "Hi", "images": [""]}, "alpaca", SHORT),
    "an image that holds nothing": ({"query": "Hello", "response": "Hi", "image": EMPTY}, "alpaca", SHORT),
    "a null beside an image": ({"messages": OPENAI, "images": ["a.png", None]}, "openai", SHOWN),
    "columns of another format that are null": ({**NOTHING, "messages": OPENAI, "images": ["a.png"]}, "openai", SHOWN),
    "calls of tools that are null": (
        {"messages": [OPENAI[0], {**OPENAI[1], "tool_calls": None, "function_call": "null"}], "images": ["a.png"]},
        "openai",
        SHOWN,
    ),
    "preferences that are null": ({**ALPACA, "chosen": None, "rejected": "", "kto_tag": None}, "alpaca", None),
    # Cells of CSV.
    "messages in JSON": ({"messages": json.dumps(OPENAI), "images": '["a.png"]'}, "openai", SHOWN),
    "messages in Python": ({"messages": str(OPENAI), "images": "['a.png']"}, "openai", SHOWN),
    "pairs in Python": ({"query": "c", "response": "d", "history": "[['a', 'b']]"}, "alpaca", None),
}


@pytest.mark.parametrize(("row", "name", "expected"), SHAPES.values(), ids=SHAPES)
def test_rows_of_every_shape_are_read(row, name, expected):
    assert detect(row) == name
    messages, losses, functions = read_row(row, None)
    assert (expected is None or messages == expected) and not functions
    assert losses == tuple(message["role"] == "assistant" for message in messages)


@pytest.mark.parametrize("name", ["openai", "sharegpt", "llava", "alpaca"])
def test_rows_of_a_named_format_need_a_marker_for_every_file(name):
    row = {
        "messages": OPENAI, "conversations": FROM_VALUE, "instruction": "What?", "output": "!", "images": ["a.png"]
    }  # fmt: skip
    with pytest.raises(DataError, match="images: found 1 for 0 <image> markers; expected as many"):
        read_row(row, name)
    assert read_row(row, "swift").messages == read_row(row, None).messages == SHOWN


@pytest.mark.parametrize("name", ["swift", None])
def test_more_markers_than_files_are_refused(name):
    with pytest.raises(DataError, match="images: found 1 for 2 <image> markers"):
        read_row({"messages": [{**OPENAI[0], "content": "<image><image>"}, OPENAI[1]], "images": ["a.png"]}, name)


def row_of(**fields):
    return {"messages": [{"role": "user", "content": "<image>?"}, {"role": "assistant", "content": "!"}]} | fields


def objects(bbox, reply="<bbox>", **fields):
    return {
        "messages": [{"role": "user", "content": "<image>?"}, {"role": "assistant", "content": reply}],
        "images": ["a.png"],
        "objects": {"ref": [], "bbox": bbox} | fields,
    }


def said(*messages, **fields):
    return {"messages": list(messages)} | fields


BROKEN = [
    ({}, "found the fields of nothing; expected 'messages'"),
    ({"text": "pre-training"}, "found the fields 'text'; expected 'messages'"),
    (row_of(), "images: found 0 for 1 <image> marker; expected as many"),
    (row_of(images=["a.png", "b.png"]), "images: found 2 for 1 <image> marker"),
    (row_of(images=["a.png"], videos=["b.mp4"]), "videos: found 1 for 0 <video> markers"),
    (row_of(images=["a.png"], image="a.png"), "image: found some beside 'images'; expected one of the two"),
    (row_of(images=[7]), r"images\[0\]'?: found the number 7"),
    (row_of(images=["  "]), "images: found 0 for 1 <image> marker"),
    (row_of(images=[None]), "images: found 0 for 1 <image> marker"),
    (row_of(images=["a.png"], audios=["a.wav"]), "audios: found some; expected none"),
    ({"texts": [{"user": "a"}]}, r"texts\[0\].assistant: found none; expected a string"),
    ({"texts": ["a"]}, r"texts\[0\]: found a string; expected an object with 'user'"),
    ({"conversation": [{"human": 7, "assistant": "b"}]}, r"conversation\[0\].human: found the number 7; expected a"),
    (row_of(images=["a.png"], rejected_response="no"), "rejected_response: found preferences"),
    ({"messages": "hello"}, "messages: found a string; expected a list of messages"),
    ({"messages": []}, "messages: found no message; expected at least one"),
    ({"conversations": None}, "conversations: found null; expected a list of messages"),
    (said("hello"), r"messages\[0\]: found a string; expected an object with 'role'"),
    (said({"content": "a"}), r"messages\[0\].role: found none; expected a string"),
    (said({"role": "user"}), r"messages\[0\].content: found none; expected a string"),
    (said({"role": "user", "content": 7}), r"messages\[0\].content: found the number 7; expected a string"),
    (said({"role": "bot", "content": "a"}), r"messages\[0\].role: found 'bot'; expected one of system, user, assist"),
    (
        said({"role": "assistant", "content": "a", "thinking": "b"}),
        r"messages\[0\].thinking: found some; expected none",
    ),
    (said({"role": "user", "content": "a"}), "messages: found no message that contributes to the loss"),
    (said({"role": "assistant", "content": "a", "loss": False}), "found no message that contributes"),
    (said({"role": "assistant", "content": " \n"}), "found an empty message 0 of the assistant"),
    (
        said({"role": "assistant", "content": "a", "loss": "yes"}),
        r"messages\[0\].loss: found 'yes'; expected true or",
    ),
    (said({"role": "assistant", "content": "a", "loss_scale": 0.5}), "loss_scale: found 0.5; expected true or false"),
    (said({"role": "user", "content": "a", "loss": True}), r"messages\[0\].loss: found True in a message of user"),
    (
        said({"role": "assistant", "content": "<image>a"}, images=["a.png"]),
        r"messages: found an item of type image in message 0 of role assistant; expected",
    ),
    (said({"role": "assistant", "content": "a\ud83d"}), r"messages\[0\]: found '\\ud83d', half of a character"),
    (said({"role": "user", "content": [7]}), r"messages\[0\].content\[0\]'?: found the number 7; expected an object"),
    (said({"role": "user", "content": [{"type": "audio"}]}), r"content\[0\]'?: found type 'audio'; expected 'text'"),
    (said({"role": "user", "content": [{}]}), r"content\[0\]'?: found no 'type'"),
    (said({"role": "user", "content": [{"type": "text"}]}), r"content\[0\].text: found none; expected a string"),
    (
        said({"role": "user", "content": [{"type": "image", "path": "a", "url": "b"}]}),
        r"content\[0\]'?: found 'path', 'url'; expected one of them",
    ),
    (said({"role": "user", "content": [{"type": "video", "video": []}]}), r"content\[0\]'?: found no frames"),
    (
        said({"role": "user", "content": [{"type": "video", "video": ["a.png"], "fps": 0}]}),
        r"content\[0\].fps: found 0; expected a number above 0",
    ),
    (
        said({"role": "user", "content": [{"type": "image"}]}, turn("assistant", "a")),
        "images: found 0 for 1 image item without a source; expected as many",
    ),
    (
        said({"role": "user", "content": [image("a.png")]}, turn("assistant", "a"), images=["a.png"]),
        "images: found 1 for 0 image items without a source",
    ),
    ({"prompt": "a", "completion": []}, "completion: found no message"),
    ({"prompt": [turn("assistant", "a")], "completion": "b", "images": ["a.png"]}, "found no message of the user"),
    ({"instruction": "a"}, "output: found none; expected a string"),
    ({"instruction": None, "output": "b"}, "instruction: found null; expected a string"),
    (
        {"instruction": "a", "output": "b", "history": 7},
        "history: found the number 7; expected a list of pairs",
    ),
    ({"instruction": "a", "output": "b", "history": [["c"]]}, r"history\[0\]: found \['c'\]; expected two"),
    ({"instruction": "a", "output": "b", "system": 7}, "system: found the number 7; expected a string"),
    ({"instruction": "a", "output": ""}, "output: found an empty message 1 of the assistant"),
    (objects([[1, 2, 3, 4]], "<bbox><bbox>"), "objects.bbox: found 1 for 2 <bbox>; expected as many"),
    (objects([[1, 2, 3, 4]], ref=["cat"]), "objects.ref: found 1 for 0 <ref-object>"),
    (objects([[1, 2, 3, 4]], "<bbox><ref-object>", ref=[7]), r"objects.ref\[0\]'?: found the number 7"),
    (objects([[1, 2, 3]]), r"objects.bbox\[0\]: found \[1, 2, 3\]; expected 4 numbers, or 2"),
    (objects([[1, 2, 3, "4"]]), r"objects.bbox\[0\]: found .*; expected 4 numbers"),
    (objects([[1, 2, 3, 81]]), r"objects.bbox\[0\]'?: found \[1, 2, 3, 81\]; .* within an image of 60 x 80 pixels"),
    (objects([[-1, 2, 3, 4]]), "within an image of 60 x 80 pixels"),
    (objects([[30, 2, 3, 4]]), "the top left corner before the bottom right one"),
    (objects([[0, 0, 1, 1.5]], bbox_type="norm1"), "expected coordinates within 0 to 1"),
    (objects([[1, 2, 3, 4]], bbox_type="norm1000"), "objects.bbox_type: found 'norm1000'; expected 'real' or"),
    (objects([[1, 2, 3, 4]], image_id=[1]), "found a box of image 1 in a conversation with 1 image"),
    (objects("all"), "objects.bbox: found a string; expected a list"),
    (row_of(images=["a.png"], objects=[]), "objects: found a list; expected an object"),
]


@pytest.mark.parametrize(("row", "says"), BROKEN, ids=range(len(BROKEN)))
def test_invalid_rows_are_named_with_found_and_expected(row, says):
    with pytest.raises(DataError, match=says):
        read_row(row, detect(row), lambda item: (60, 80))


DOCUMENTED = [LLAMA_FACTORY, LLAMA_FACTORY_VIDEO, SHAREGPT, LLAVA, ALPACA, SWIFT, TRL, TRL_COMPLETION]
WORDS = ["", "a", "user", "tool", "human", "gpt", "image", "<image>", "<video>", "<bbox>", "norm1", "type", "content"]
JSON = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(-2, 2), st.floats(), st.sampled_from(WORDS)),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.sampled_from(WORDS), inner, max_size=3)),
    max_leaves=5,
)


def places(value, before=()):
    """The path to every value inside a row, and the row's own."""
    yield before
    inside = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in inside:
        yield from places(inner, (*before, key))


@hypothesis.given(st.data())
@hypothesis.settings(max_examples=500)
def test_any_row_is_read_or_refused_with_the_field(data):
    row = copy.deepcopy(data.draw(st.sampled_from(DOCUMENTED)))
    *before, last = data.draw(st.sampled_from([place for place in places(row) if place]))
    value = row
    for key in before:
        value = value[key]
    value[last] = data.draw(JSON)
    try:
        messages, losses, _ = read_row(row, detect(row), lambda item: (60, 80))
    except DataError as error:
        assert re.match(r"(field ')?[\w.\[\]]+'?: found ", str(error))
    else:
        assert len(messages) == len(losses)
        assert any(losses)


TEXTS = st.text(st.characters(exclude_characters="<>", codec="utf-8"), min_size=1, max_size=8).filter(str.strip)
PATHS = st.from_regex(r"[a-z]{1,8}/[a-z]{1,8}\.(png|jpg)", fullmatch=True)
QUESTIONS = st.lists(st.one_of(TEXTS.map(text), PATHS.map(image)), min_size=1, max_size=4).filter(
    # Two texts side by side are one in formats with markers.
    lambda items: all(a["type"] == "image" or b["type"] == "image" for a, b in itertools.pairwise(items))
)


@hypothesis.given(st.lists(st.tuples(QUESTIONS, TEXTS), min_size=1, max_size=3), st.none() | TEXTS)
def test_one_conversation_reads_alike_in_every_format(pairs, system):
    asked = [{"role": "user", "content": items} for items, _ in pairs]
    told = [turn("assistant", answer) for _, answer in pairs]
    messages = [message for pair in zip(asked, told, strict=True) for message in pair]
    messages = ([turn("system", system)] if system else []) + messages
    marked = ["".join("<image>" if i["type"] == "image" else i["text"] for i in m["content"]) for m in messages]
    images = [item["path"] for message in messages for item in message["content"] if item["type"] == "image"]
    roles = {"system": "system", "user": "human", "assistant": "gpt"}
    plain = [{"role": message["role"], "content": content} for message, content in zip(messages, marked, strict=True)]
    questions = marked[1:] if system else marked
    rows = {
        "openai": {"messages": plain, "images": images},
        "swift": {"messages": plain, "images": images, "objects": {"ref": [], "bbox": []}},
        "sharegpt": {
            "conversations": [{"from": roles[p["role"]], "value": p["content"]} for p in plain],
            "images": images,
        },
        "llava": {
            "conversations": [{"from": roles[p["role"]], "value": p["content"]} for p in plain],
            "image": images,
        },
        "alpaca": {
            "instruction": questions[-2],
            "input": "",
            "output": questions[-1],
            "history": [list(pair) for pair in zip(questions[:-2:2], questions[1:-2:2], strict=True)],
            "system": system,
            "images": images,
        },
        "hf": {"messages": messages},
    }
    given = {name: read_row(row, detect(row)) for name, row in rows.items()}
    for name, turns in given.items():
        assert turns == (tuple(messages), tuple(m["role"] == "assistant" for m in messages), ()), name
    sourceless = [
        m | {"content": [{"type": "image"} if i["type"] == "image" else i for i in m["content"]]} for m in messages
    ]
    assert read_row({"messages": sourceless, "images": images}, "hf") == given["hf"]
