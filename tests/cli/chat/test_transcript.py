"""`/save`: conversations as files."""

import json
import os
import pathlib

import pytest

from glm4v_jax.cli.chat.commands import handle
from glm4v_jax.errors import MessageError


def run(session, *lines):
    for line in lines:
        handle(session, line)


def test_markdown_has_every_part_of_the_conversation(session, image, video):
    run(session, "/set think_budget 4", "/set answer_budget 4", "/system Be brief.", f"/image {image}")
    run(session, f"/video {video}", "What?", "/save talk")
    completion = session.turns[0].completion
    assert pathlib.Path("talk.md").read_text() == (
        "# Conversation\n\nModel: `tiny`\n\n## System\n\nBe brief.\n\n## User\n\n"
        "![image](<image.png>) (84 × 56 pixels, 12 tokens)\n\n"
        "[video](<video.gif>) (84 × 56 pixels, 4 of 4 frames, 12 tokens)\n\nWhat?\n\n## Model\n\n"
        f"<details>\n<summary>Thought</summary>\n\n{completion.thought}\n\n</details>\n\n{completion.answer}\n\n"
        f"*{len(completion.tokens)} tokens, length*\n"
    )
    assert sorted(os.listdir()) == ["image.png", "talk.md", "video.gif"]


def test_json_is_a_prompt_to_continue_from(session, engine, image):
    run(session, "/system Be brief.", f"/image {image}", "What?", "/save talk.json")
    content = json.loads(pathlib.Path("talk.json").read_text())
    messages = [*content["messages"], {"role": "user", "content": "And?"}]
    run(session, "And?")
    assert engine.generate(messages, do_sample=False, max_new_tokens=8).text == session.turns[-1].completion.text
    assert [completion["text"] for completion in content["completions"]] == [session.turns[0].completion.text]
    assert content["completions"][0]["finish_reason"] == "length"


def test_an_earlier_conversation_is_overwritten_on_request_only(new_session):
    run(new_session(model="another"), "/save mine.md")
    before = pathlib.Path("mine.md").read_text()
    session = new_session()
    run(session, "Hello")
    with pytest.raises(FileExistsError, match="/save! overwrites it"):
        run(session, "/save mine.md")
    assert pathlib.Path("mine.md").read_text() == before
    run(session, "/save! mine.md")
    assert "Hello" in pathlib.Path("mine.md").read_text()


def test_a_session_overwrites_its_own_file(session):
    for name in ("mine.md", "mine.json"):
        run(session, f"/save {name}", "You?", f"/save {name}")
        assert "You?" in pathlib.Path(name).read_text()


@pytest.mark.parametrize("name", ["nowhere/mine.md", ".", ""])
def test_a_name_without_a_place_is_refused(session, name):
    with pytest.raises((OSError, MessageError)):
        run(session, f"/save {name}")
    assert os.listdir() == []


@pytest.mark.parametrize("command", ["/save", "/save!"])
@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("photo.jpg", b"", "expected one of .md"),
        ("photo.md", b"\x89PNG", "not a conversation"),
        ("notes.md", b"# Conversation\n\nof mine\n", "not a conversation"),
        ("data.json", b'{"messages": []}', "not a conversation"),
        ("list.json", b"[]", "not a conversation"),
    ],
)
def test_another_kind_of_file_is_never_overwritten(session, command, name, content, words):
    pathlib.Path(name).write_bytes(content)
    with pytest.raises((OSError, MessageError), match=words):
        run(session, f"{command} {name}")
    assert (os.listdir(), pathlib.Path(name).read_bytes()) == ([name], content)
