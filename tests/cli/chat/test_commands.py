"""Commands that begin with a slash."""

import json
import os
import pathlib

import numpy as np
import PIL.Image
import pytest

from glm4v_jax.cli.chat.commands import COMMANDS, HELP, handle
from glm4v_jax.errors import GenerationError, Glm4vError, MediaError, MessageError
from glm4v_jax.generate.completion import Completion, Delta


def texts(session):
    return [turn.completion.text for turn in session.turns]


def run(session, *lines):
    for line in lines:
        handle(session, line)


def attached(session):
    return [len(turn.attachments) for turn in session.turns]


# Which lines are commands.


def test_a_command_takes_precedence_over_a_path(session, image, tmp_path):
    run(session, f"/image {image}")
    assert session.turns == [] and len(session.attached) == 1
    with pytest.raises(MessageError, match="/nowhere: found an unknown command; expected one of /image"):
        run(session, "/nowhere is what?")


def test_a_message_may_begin_with_the_path_of_a_file(session):
    path = pathlib.Path("file").absolute()
    path.write_text("")
    run(session, f"{path} what is that?")
    assert len(session.turns) == 1


def test_help_lists_every_command(session, capfd):
    run(session, "/help")
    assert capfd.readouterr().err.strip() == HELP
    assert [line.split()[0] for line in HELP.splitlines()[:-1]] == list(COMMANDS)


def test_quit_ends_the_session(session):
    assert not session.is_over
    run(session, "/quit")
    assert session.is_over


@pytest.mark.parametrize("name", ["/image", "/video", "/undo", "/retry", "/save", "/save!", "/boxes"])
def test_an_error_of_a_command_leaves_the_session_as_it_was(session, name):
    with pytest.raises((Glm4vError, OSError)):
        run(session, name)
    assert session.turns == []


# Images, undo and retry.


def test_images_come_before_videos_and_are_read_once(session, image, video):
    run(session, f"/video {video}", f"/image {image} {image}")
    os.remove(image)
    run(session, "Compare.")
    assert [item.kind for item in session.turns[0].attachments] == ["image", "image", "video"]
    assert session.turns[0].completion.image_sizes == ((84, 56), (84, 56))
    with pytest.raises(MediaError, match=r"image\.png: found no such file"):
        run(session, f"/image {image}")


def test_retry_samples_another_answer_to_the_same_message(new_session, image):
    session = new_session("rollouts", temperature=1.5)
    run(session, f"/image {image}", "What?")
    first = texts(session)
    run(session, "/retry")
    assert [item.place for item in session.turns[0].attachments] == [image]
    assert len(session.turns) == 1 and texts(session) != first


def test_undo_removes_a_turn_as_if_it_had_never_been(session, image):
    run(session, f"/image {image}", "What?", "And?", "/undo", "/undo", "Hello")
    assert attached(session) == [0]
    assert "image" not in json.dumps(session.conversation.messages)


def test_undo_removes_what_was_added_to_the_next_message_first(session, capfd, image):
    run(session, "Hello", f"/image {image}", "/undo")
    assert f"removed from the next message: {image}" in capfd.readouterr().err
    run(session, "Hello")
    assert attached(session) == [0, 0]


def test_what_is_added_before_a_retry_goes_with_the_next_message(session, image):
    run(session, f"/image {image}", "What?", f"/image {image}", "/retry")
    assert attached(session) == [1]
    run(session, "And this?", "And?")
    assert attached(session) == [1, 1, 0]


# Options.


def test_the_system_prompt_can_change(session, engine):
    for command, system in (("/system Be brief.", "Be brief."), ("/system", None)):
        run(session, command, "Hello")
        expected = engine.conversation(system, do_sample=False, max_new_tokens=8).send("Hello").text
        assert texts(session) == [expected]
        run(session, "/undo")


def test_set_changes_an_option_and_resets_it(session):
    run(session, "/set max-new-tokens 3", "Hello", "/set max_new_tokens", "Hello")
    assert [len(turn.completion.tokens) for turn in session.turns] == [3, 8]


def test_set_without_a_name_lists_the_options(session, capfd):
    run(session, "/set think_budget 2", "/set stop_strings ['x', 'y']")
    capfd.readouterr()
    run(session, "/set")
    listed = capfd.readouterr().err
    for words in ("do_sample False", "max_new_tokens 8", "think_budget 2", "stop_strings ('x', 'y')"):
        assert words in listed
    for name in ("logprobs", "max_length", "num_return_sequences", "pad_token_id", "use_cache"):
        assert f"{name} " not in listed


def test_options_override_those_of_a_preset(session, capfd):
    run(session, "/set think_budget 2", "/preset bench", "/set")
    listed = capfd.readouterr().err
    assert "do_sample False" in listed and "max_new_tokens 8192" in listed and "think_budget 2" in listed
    run(session, "/preset")
    assert "* bench" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("/set top_p 2", "top_p: found 2"),
        ("/preset best", "best"),
        ("/set colour 3", "/set: found colour; expected one of .*, think_budget, "),
        ("/set logprobs", "/set: found logprobs; expected one of .*, think_budget, "),
    ],
)
def test_an_invalid_option_changes_nothing(session, line, words):
    before = session.config()
    with pytest.raises(GenerationError, match=words):
        run(session, line)
    assert session.config() == before


def test_stats_are_about_the_conversation(session, capfd, image):
    run(session, "/stats")
    assert capfd.readouterr().err == "no turns\n"
    run(session, f"/image {image}", "What?", "And?")
    first, second = session.turns
    assert first.reused == 0
    assert 0 < second.reused < second.completion.prompt_tokens
    capfd.readouterr()
    run(session, "/stats")
    shown = capfd.readouterr().err
    prompt = first.completion.prompt_tokens + second.completion.prompt_tokens
    assert f"tokens in the conversation: {second.completion.prompt_tokens + 8} of 65536" in shown
    assert f"prompt tokens: {prompt}, {second.reused} from the cache" in shown
    assert "new tokens: 16" in shown


# Boxes.


@pytest.fixture
def with_a_box(session, monkeypatch, image):
    """A session whose every answer has a box in the upper left quarter of an image, which has been asked about."""

    def ask(message, **options):
        completion = Completion(0, "<answer>[[0, 0, 500, 500]]", (1, 2), 9, "stop", image_sizes=((84, 56),))
        session.conversation.completions.append(completion)
        yield Delta(completion.text, (), (1, 2), completion)

    monkeypatch.setattr(session.conversation, "ask", ask)
    run(session, f"/image {image}", "Where?")
    return session


def test_boxes_are_printed_in_pixels_and_drawn(capfd, with_a_box, image):
    assert "boxes in pixels: [0, 0, 42, 28]; /boxes FILE draws them" in capfd.readouterr().err
    run(with_a_box, "/boxes out")
    with PIL.Image.open("out.png") as drawn, PIL.Image.open(image) as before:
        assert drawn.size == (84, 56)
        changed = np.argwhere((np.asarray(drawn) != np.asarray(before)).any(axis=-1))
    assert changed.max(axis=0).tolist() <= [28, 42]


def test_boxes_overwrite_only_a_file_of_the_session(with_a_box, image):
    before = pathlib.Path(image).read_bytes()
    run(with_a_box, "/boxes out.png", "/boxes out.png")
    with pytest.raises(MediaError, match="which exists"):
        run(with_a_box, f"/boxes {image}")
    with pytest.raises(MediaError, match=r"expected a name that ends in \.png"):
        run(with_a_box, "/boxes out.unknown")
    assert pathlib.Path(image).read_bytes() == before


def test_a_failed_write_leaves_the_drawn_boxes_of_before(with_a_box, monkeypatch):
    def fail(image, path, *_):
        pathlib.Path(path).write_bytes(b"half")
        raise OSError(28, "No space left on device", str(path))

    run(with_a_box, "/boxes out.png")
    before = pathlib.Path("out.png").read_bytes()
    monkeypatch.setattr(PIL.Image.Image, "save", fail)
    with pytest.raises(OSError, match="No space"):
        run(with_a_box, "/boxes out.png")
    assert pathlib.Path("out.png").read_bytes() == before


def test_boxes_need_exactly_one_image(capfd, with_a_box, image):
    run(with_a_box, f"/image {image}")
    capfd.readouterr()
    run(with_a_box, "Where?")
    assert "boxes in pixels" not in capfd.readouterr().err
    with pytest.raises(MediaError, match="found 2 images"):
        run(with_a_box, "/boxes out.png")
