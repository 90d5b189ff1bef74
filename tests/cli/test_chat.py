"""`glm4v chat`: turns, commands and files; Ctrl-C and what it looks like in a terminal."""

import dataclasses
import io
import json
import os
import pathlib
import signal
import sys

import numpy as np
import PIL.Image
import pytest
from helpers_checkpoints import RANDOM_CHECKPOINT
from helpers_cli import refuse_weights, save_noise
from helpers_terminal import Terminal

from glm4v_jax.cli import main
from glm4v_jax.cli.chat.attachments import places
from glm4v_jax.cli.chat.chat import Chat
from glm4v_jax.cli.chat.interrupt import Interrupt
from glm4v_jax.cli.chat.session import HELP, Session
from glm4v_jax.console.answer_writer import AnswerWriter
from glm4v_jax.errors import GenerationError, Glm4vError, MediaError, MessageError
from glm4v_jax.generate.completion import Completion, Delta
from glm4v_jax.generate.slots import Slots
from glm4v_jax.inputs.media import load
from glm4v_jax.inputs.media.load import load_image
from glm4v_jax.inputs.vision.image import Glm4vImageProcessor

GREEDY = {"do_sample": False}


@pytest.fixture
def picture():
    save_noise("picture.png")
    return "picture.png"


@pytest.fixture(scope="module")
def engine():
    from glm4v_jax.generate.engine import Engine

    return Engine.from_pretrained(RANDOM_CHECKPOINT)


@pytest.fixture
def session(engine):
    return Session(engine, "tiny", None, None, GREEDY, 8)


def texts(session):
    return [turn.completion.text for turn in session.turns]


def chat(monkeypatch, capfd, text, *arguments):
    """Runs `glm4v chat` on a text as if it came through a pipe; returns status, answers and the rest."""
    monkeypatch.setattr(sys, "stdin", io.StringIO(text))
    status = main.main(["chat", *map(str, arguments)])
    captured = capfd.readouterr()
    return status, captured.out, captured.err


# Turns.


def test_lines_of_a_pipe_are_messages(monkeypatch, capfd, engine, picture):
    text = f"/image {picture}\nWhat?\n\nAnd now?\\\nTell me.\n"
    status, out, err = chat(monkeypatch, capfd, text, "--greedy", "--max-new-tokens", 6)
    conversation = engine.conversation(do_sample=False, max_new_tokens=6)
    first = conversation.send("What?", images=[picture])
    second = conversation.send("And now?\nTell me.")
    assert (status, out) == (0, f"{first.text}\n{second.text}\n")
    assert "picture.png: 84 × 56 pixels, 12 tokens; goes with the next message" in err
    assert f"[{first.prompt_tokens} prompt tokens; 6 new" in err
    assert f"[{second.prompt_tokens} prompt tokens, " in err and "from the cache" in err


def test_options_of_the_command_are_those_of_the_conversation(monkeypatch, capfd, engine, picture, film):
    options = ("--image", picture, "--video", film, "--system", "Be brief.", "--max-new-tokens", 5, "--seed", 3)
    status, out, _ = chat(monkeypatch, capfd, "What?", *options, "--preset", "rollouts")
    conversation = engine.conversation("Be brief.", preset="rollouts", max_new_tokens=5, seed=3)
    expected = conversation.send("What?", images=[picture], videos=[film])
    assert (status, out) == (0, expected.text + "\n")


def test_the_tiny_model_says_little_by_default(monkeypatch, capfd):
    monkeypatch.setattr("glm4v_jax.console.options.TINY_CHECKPOINT", RANDOM_CHECKPOINT)
    assert "; 64 new" in chat(monkeypatch, capfd, "Hello", "--greedy")[2]


def test_the_length_of_a_preset_counts(engine, monkeypatch):
    """That of `cli` is 8,192; stopped here as soon as it is more than what a checkpoint without a length gives."""
    session, shown = Session(engine, "tiny", None, "cli", {}, 64), []
    show = AnswerWriter.show

    def interrupted(writer, delta):
        show(writer, delta)
        shown.extend(delta.tokens)
        if len(shown) > 40:
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(AnswerWriter, "show", interrupted)
    session.take("Hello")
    (turn,) = session.turns
    assert turn.completion.finish_reason == "cancelled"
    assert len(turn.completion.tokens) > 40


def test_a_picture_of_an_option_is_read_once(monkeypatch, capfd, picture):
    read = []

    def reading(place):
        read.append(place)
        return load_image(place)

    monkeypatch.setattr(load, "load_image", reading)
    status, _, err = chat(monkeypatch, capfd, "What?", "--image", picture, "--greedy", "--max-new-tokens", 2)
    assert (status, read) == (0, [picture])
    assert f"{picture}: 84 × 56 pixels, 12 tokens; goes with the next message" in err


def test_what_fails_is_a_line_and_the_rest_goes_on(monkeypatch, capfd):
    pathlib.Path("notes.png").write_text("no picture")
    text = "/nope\n/image nowhere.png\n/image notes.png\n/set temperature cold\n/save\n/boxes x.png\n/undo\nHello\n"
    status, out, err = chat(monkeypatch, capfd, text, "--greedy", "--max-new-tokens", 4)
    assert status == 1
    assert len(out.splitlines()) == 1
    lines = err.splitlines()
    for line, words in zip(lines, [
        "error: /nope: found no such command, expected one of /image",
        "error: nowhere.png: there is no such file",
        "error: notes.png: is not a readable picture",
        "error: temperature: found 'cold'",
        "error: /save: found no file",
        "error: /boxes: found 0 pictures",
        "error: undo: found a conversation without turns",
        "[8 prompt tokens; 4 new",
    ], strict=False):  # fmt: skip
        assert line.startswith(words)
    assert lines[-1] == "glm4v: error: 7 lines of the input failed"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--image", "nowhere.png"], ["--image nowhere.png"]),
        (["--image", "notes.png"], ["notes.png", "not a readable picture"]),
        (["--preset", "best"], ["best", "greedy"]),
        (["--greedy", "--top-k", "3"], ["--greedy", "--top-k"]),
        (["--model", "nowhere"], ["--model nowhere"]),
    ],
)
def test_what_cannot_be_is_said_before_weights_are_loaded(monkeypatch, capfd, arguments, words):
    refuse_weights(monkeypatch)
    pathlib.Path("notes.png").write_text("no picture")
    status, out, err = chat(monkeypatch, capfd, "Hello", *arguments)
    assert (status, out) == (1, "")
    (line,) = err.splitlines()
    for word in words:
        assert word in line


def test_a_command_is_one_whatever_the_file_system_has(session, monkeypatch, picture, capfd):
    exists = os.path.exists
    monkeypatch.setattr(os.path, "exists", lambda path: path in ("/image", "/x.png") or exists(path))
    asked = []
    monkeypatch.setattr(Session, "ask", lambda _, message: asked.append(message.text))
    session.take(f"/image {picture}")
    assert not asked and "goes with the next message" in capfd.readouterr().err
    session.take("/x.png is what?")  # begins with a path
    assert asked == ["/x.png is what?"]
    with pytest.raises(MessageError, match="found no such command"):
        session.take("/nowhere.png is what?")


def test_too_long_a_conversation_is_a_line_and_the_session_goes_on(session):
    session.take("Hello")
    before = texts(session)
    session.take("/set max_new_tokens 65536")
    with pytest.raises(GenerationError, match="max_position_embeddings"):
        session.take("More?")
    assert texts(session) == before
    session.take("/set max_new_tokens 8")
    session.take("/retry")  # what failed
    assert [turn.text for turn in session.turns] == ["Hello", "More?"]


# Commands.


def test_undo_takes_back_and_retry_draws_anew(engine, capfd, picture):
    session = Session(engine, "tiny", None, "rollouts", {"temperature": 1.5}, 8)
    session.take(f"/image {picture}")
    session.take("What?")
    first = texts(session)
    session.take("/retry")
    assert len(session.turns) == 1
    assert [item.place for item in session.turns[0].attachments] == [picture]
    second = texts(session)
    assert second != first
    session.take("And?")
    session.take("/undo")
    assert texts(session) == second
    # As if the turn had never been.
    session.take("/undo")
    assert session.turns == []
    session.take("Hello")
    assert "image" not in json.dumps(session._conversation.messages)
    capfd.readouterr()
    session.take(f"/image {picture}")
    session.take("/undo")
    assert f"not shown with the next message: {picture}" in capfd.readouterr().err
    session.take("Hello")
    assert session.turns[-1].attachments == ()


def test_what_is_attached_before_a_retry_goes_with_the_next_message(session, picture):
    session.take("/image picture.png")
    session.take("What?")
    session.take("/image picture.png")
    session.take("/retry")
    assert [len(turn.attachments) for turn in session.turns] == [1]
    session.take("And this?")
    assert [len(turn.attachments) for turn in session.turns] == [1, 1]
    session.take("And?")
    assert session.turns[-1].attachments == ()


def test_turns_do_not_share_their_draws(engine):
    session = Session(engine, "tiny", None, "rollouts", {"temperature": 50.0, "seed": 2**32 - 1}, 8)
    session.take("Hello")
    session.take("Hello")
    # So hot that the text before has no weight: equal draws would give equal tokens.
    assert texts(session)[0] != texts(session)[1]
    same = [engine.generate("Hello", temperature=50.0, seed=7, preset="rollouts", max_new_tokens=8) for _ in range(2)]
    assert same[0].tokens == same[1].tokens


def test_pictures_come_before_videos_and_are_read_once(session, engine, picture, film):
    session.take(f"/video {film}")
    session.take(f"/image {picture} {picture}")
    os.remove(picture)
    session.take("Compare.")
    assert [item.kind for item in session.turns[0].attachments] == ["image", "image", "video"]
    assert session.turns[0].completion.image_sizes == ((84, 56), (84, 56))
    with pytest.raises(MediaError, match=r"picture\.png: there is no such file"):
        session.take(f"/image {picture}")


def test_what_the_system_says_can_change(session, engine):
    session.take("Hello")
    session.take("/system Be brief.")
    session.take("/undo")
    session.take("Hello")
    assert texts(session) == [engine.conversation("Be brief.", do_sample=False, max_new_tokens=8).send("Hello").text]
    session.take("/system")
    session.take("/undo")
    session.take("Hello")
    assert texts(session) == [engine.conversation(do_sample=False, max_new_tokens=8).send("Hello").text]


def test_options_can_change(session, capfd):
    session.take("/set max-new-tokens 3")
    session.take("Hello")
    assert len(session.turns[-1].completion.tokens) == 3
    session.take("/set max_new_tokens")
    session.take("Hello")
    assert len(session.turns[-1].completion.tokens) == 8
    session.take("/set think_budget 2")
    session.take("/set stop_strings ['x', 'y']")
    capfd.readouterr()
    session.take("/set")
    told = capfd.readouterr().err
    for words in ("do_sample False", "max_new_tokens 8", "think_budget 2", "stop_strings ('x', 'y')"):
        assert words in told
    session.take("/preset bench")
    session.take("/set")
    told = capfd.readouterr().err
    # What was set goes over the preset.
    assert "do_sample False" in told and "max_new_tokens 8192" in told and "think_budget 2" in told
    session.take("/preset")
    assert "* bench" in capfd.readouterr().err
    for line in ("/set top_p 2", "/preset best"):
        with pytest.raises(GenerationError):
            session.take(line)
    for name in ("colour", "logprobs", "max_length", "num_return_sequences", "pad_token_id", "use_cache"):
        assert f"{name} " not in told
        for line in (f"/set {name} 3", f"/set {name}"):
            with pytest.raises(GenerationError, match=f"{name}: found no option of a chat, .*, think_budget, "):
                session.take(line)
    session.take("/set")
    assert capfd.readouterr().err == told.splitlines()[-1] + "\n"


def test_stats_are_about_the_conversation(session, capfd, picture):
    session.take("/stats")
    assert capfd.readouterr().err == "nothing has been said\n"
    session.take(f"/image {picture}")
    session.take("What?")
    session.take("And?")
    first, second = session.turns
    assert first.reused == 0
    assert 0 < second.reused < second.completion.prompt_tokens
    capfd.readouterr()
    session.take("/stats")
    told = capfd.readouterr().err
    prompt = first.completion.prompt_tokens + second.completion.prompt_tokens
    assert f"tokens in the conversation: {second.completion.prompt_tokens + 8} of 65536" in told
    assert f"tokens of prompts: {prompt}, {second.reused} of them from the cache" in told
    assert "new tokens: 16" in told


def test_compiling_is_told_of_where_it_took_long(session):
    session.take("Hello")
    (turn,) = session.turns
    told = session._figures(dataclasses.replace(turn, seconds=9.6, compiled=9.1))
    assert "new in 9.60 s, 9.1 s of them compiling, first after" in told
    assert "compiling" not in session._figures(dataclasses.replace(turn, compiled=0.4))


def test_a_closed_thought_is_no_reuse_of_the_cache(session):
    session.take("/set think_budget 3")
    session.take("/set answer_budget 3")
    session.take("Hello")
    assert "</think>" in session.turns[0].completion.text
    assert session.turns[0].reused == 0


def test_help_has_every_command(session, capfd):
    session.take("/help")
    assert capfd.readouterr().err.strip() == HELP
    for command in session.commands:
        assert command in (*HELP.split(), "/help")
    assert not session.is_over
    session.take("/quit")
    assert session.is_over


def test_a_message_may_begin_with_the_path_of_a_file(session):
    path = pathlib.Path("file").absolute()
    path.write_text("")
    session.take(f"{path} what is that?")
    assert len(session.turns) == 1


def test_places_may_have_spaces_and_quotes(monkeypatch):
    pathlib.Path("my file.png").write_text("")
    assert places("my file.png") == ["my file.png"]
    assert places("'my file.png' b.png") == ["my file.png", "b.png"]
    assert places(r"my\ file.png") == ["my file.png"]
    assert places("https://host/a b.png") == ["https://host/a b.png"]
    monkeypatch.setenv("HOME", os.getcwd())
    assert places("~/my file.png") == ["~/my file.png"]
    for text in ("", "  ", "it's.png"):
        with pytest.raises(MediaError):
            places(text)


# Boxes.


def scripted(session, monkeypatch, text, sizes):
    """The next answer is this text."""

    def ask(message, **options):
        completion = Completion(0, text, (1, 2), 9, "stop", image_sizes=sizes)
        session._conversation.completions.append(completion)
        yield Delta(text, (), (1, 2), completion)

    monkeypatch.setattr(session._conversation, "ask", ask)


def broken_off(image, path, *_):
    """Of a disk that is full."""
    pathlib.Path(path).write_bytes(b"half")
    raise OSError(28, "No space left on device", str(path))


def test_boxes_are_told_in_pixels_and_drawn(session, monkeypatch, capfd, picture):
    with pytest.raises(MediaError, match="0 pictures"):
        session.take("/boxes out.png")
    scripted(session, monkeypatch, "<answer>[[0, 0, 500, 500]]", ((84, 56),))
    session.take(f"/image {picture}")
    session.take("Where?")
    assert "boxes in pixels: [0, 0, 42, 28]; /boxes FILE draws them" in capfd.readouterr().err
    session.take("/boxes out")
    before = np.asarray(PIL.Image.open(picture))
    with PIL.Image.open("out.png") as drawn:
        assert drawn.size == (84, 56)
        changed = np.argwhere((np.asarray(drawn) != before).any(axis=-1))
    assert changed.max(axis=0).tolist() <= [28, 42]
    session.take("/boxes out.png")  # of this session
    with pytest.raises(MediaError, match="is there already"):
        session.take(f"/boxes {picture}")
    assert np.array_equal(np.asarray(PIL.Image.open(picture)), before)
    with pytest.raises(MediaError, match="unknown format"):
        session.take("/boxes out.unknown")
    with monkeypatch.context() as patch:
        patch.setattr(PIL.Image.Image, "save", broken_off)
        with pytest.raises(OSError, match="No space"):
            session.take("/boxes out.png")
    with PIL.Image.open("out.png") as drawn:
        drawn.load()
    session.take(f"/image {picture}")
    session.take("Where?")
    assert "boxes in pixels" not in capfd.readouterr().err
    with pytest.raises(MediaError, match="2 pictures"):
        session.take("/boxes out.png")


# Files.


def test_a_transcript_can_be_read(session, capfd, picture, film):
    session.take("/set think_budget 4")
    session.take("/set answer_budget 4")
    session.take("/system Be brief.")
    session.take(f"/image {picture}")
    session.take(f"/video {film}")
    session.take("What?")
    session.take("/save talk")
    completion = session.turns[0].completion
    assert pathlib.Path("talk.md").read_text() == (
        "# Conversation\n\nModel: `tiny`\n\n## System\n\nBe brief.\n\n## User\n\n"
        "![image](<picture.png>) (84 × 56 pixels, 12 tokens)\n\n"
        "[video](<film.gif>) (84 × 56 pixels, 4 of 4 frames, 12 tokens)\n\nWhat?\n\n## Model\n\n"
        f"<details>\n<summary>Thought</summary>\n\n{completion.thought}\n\n</details>\n\n{completion.answer}\n\n"
        f"*{len(completion.tokens)} tokens, length*\n"
    )
    assert sorted(os.listdir()) == ["film.gif", "picture.png", "talk.md"]


def test_a_transcript_in_json_is_a_prompt_to_go_on_with(session, engine, picture):
    session.take("/system Be brief.")
    session.take(f"/image {picture}")
    session.take("What?")
    session.take("/save talk.json")
    told = json.loads(pathlib.Path("talk.json").read_text())
    messages = [*told["messages"], {"role": "user", "content": "And?"}]
    session.take("And?")
    assert engine.generate(messages, do_sample=False, max_new_tokens=8).text == session.turns[-1].completion.text
    assert [completion["text"] for completion in told["completions"]] == texts(session)[:1]
    assert told["completions"][0]["finish_reason"] == "length"


def test_a_file_is_not_replaced_without_saying(engine):
    Session(engine, "another", None, None, GREEDY, 8).take("/save mine.md")
    before = pathlib.Path("mine.md").read_text()
    session = Session(engine, "tiny", None, None, GREEDY, 8)
    session.take("Hello")
    with pytest.raises(FileExistsError, match="/save! replaces it"):
        session.take("/save mine.md")
    assert pathlib.Path("mine.md").read_text() == before
    session.take("/save! mine.md")
    assert "Hello" in pathlib.Path("mine.md").read_text()
    session.take("You?")
    session.take("/save mine.md")  # of this session
    assert "You?" in pathlib.Path("mine.md").read_text()
    for name in ("nowhere/mine.md", "."):
        with pytest.raises(OSError):
            session.take(f"/save {name}")
    with pytest.raises(MessageError):
        session.take("/save")
    assert os.listdir() == ["mine.md"]


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("photo.jpg", None, "expected one of .md"),
        ("photo.md", None, "no conversation of glm4v chat"),
        ("notes.md", b"# Conversation\n\nof mine\n", "no conversation of glm4v chat"),
        ("data.json", b'{"messages": []}', "no conversation of glm4v chat"),
        ("list.json", b"[]", "no conversation of glm4v chat"),
    ],
)
def test_what_is_no_conversation_is_never_replaced(session, picture, name, content, words):
    pathlib.Path(name).write_bytes(pathlib.Path(picture).read_bytes() if content is None else content)
    before = {path: path.read_bytes() for path in pathlib.Path().iterdir()}
    session.take("Hello")
    for command in ("/save", "/save!"):
        with pytest.raises((OSError, MessageError), match=words):
            session.take(f"{command} {name}")
    assert {path: path.read_bytes() for path in pathlib.Path().iterdir()} == before


def test_a_conversation_in_json_can_be_replaced(engine):
    for _ in range(2):
        session = Session(engine, "tiny", None, None, GREEDY, 8)
        session.take("Hello")
        session.take("/save! talk.json")
    assert len(json.loads(pathlib.Path("talk.json").read_text())["completions"]) == 1


# Ctrl-C.


def test_a_first_interrupt_is_noted_and_a_second_one_raised():
    before = signal.getsignal(signal.SIGINT)
    with Interrupt() as interrupt:
        assert not interrupt.is_set
        signal.raise_signal(signal.SIGINT)
        assert interrupt.is_set
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is before


def test_an_interrupted_answer_stays_and_the_session_goes_on(session, engine, monkeypatch, capfd):
    session.take("/set max_new_tokens 500")
    shown = []
    show = AnswerWriter.show

    def interrupted(writer, delta):
        show(writer, delta)
        shown.append(delta)
        if len(shown) == 2:
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(AnswerWriter, "show", interrupted)
    session.take("What is this?")
    assert len(shown) == 2
    (turn,) = session.turns
    assert turn.completion.finish_reason == "cancelled"
    assert turn.completion.text == "".join(delta.text for delta in shown)
    assert "stopped by you" in capfd.readouterr().err
    session.take("/set max_new_tokens 8")
    session.take("And?")
    messages = [
        {"role": "user", "content": "What is this?"},
        {"role": "assistant", "content": turn.completion.text},
        {"role": "user", "content": "And?"},
    ]
    assert session.turns[-1].completion.text == engine.generate(messages, do_sample=False, max_new_tokens=8).text


def test_a_second_interrupt_does_not_wait_and_what_there_is_stays(session, engine, monkeypatch):
    session.take("/set max_new_tokens 500")
    show = AnswerWriter.show

    def interrupted(writer, delta):
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(AnswerWriter, "show", interrupted)
    with pytest.raises(KeyboardInterrupt):
        session.take("What is this?")
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    (turn,) = session.turns
    assert turn.completion.finish_reason == "cancelled"
    monkeypatch.setattr(AnswerWriter, "show", show)
    session.take("/undo")
    session.take("/set max_new_tokens 8")
    session.take("And?")
    assert texts(session) == [engine.generate("And?", do_sample=False, max_new_tokens=8).text]


def test_a_second_interrupt_before_the_first_token_leaves_the_conversation_as_it_was(
    session, engine, monkeypatch, picture
):
    session.take("Hello")
    start = Slots.start

    def interrupted(*arguments, **options):
        chosen = start(*arguments, **options)
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)
        return chosen

    monkeypatch.setattr(Slots, "start", interrupted)
    session.take("/image picture.png")
    with pytest.raises(KeyboardInterrupt):
        session.take("What is this?")
    assert [turn.text for turn in session.turns] == ["Hello"]
    monkeypatch.setattr(Slots, "start", start)
    session.take("/retry")
    assert [len(turn.attachments) for turn in session.turns] == [0, 1]
    session.take("And?")
    messages = [
        {"role": "user", "content": "Hello"},
        {"role": "assistant", "content": texts(session)[0]},
        {
            "role": "user",
            "content": [{"type": "image", "path": picture}, {"type": "text", "text": "What is this?"}],
        },
        {"role": "assistant", "content": texts(session)[1]},
        {"role": "user", "content": "And?"},
    ]
    assert texts(session)[2] == engine.generate(messages, do_sample=False, max_new_tokens=8).text


@pytest.mark.parametrize("when", ["attached", "asked"])
def test_an_interrupt_while_something_is_read_keeps_the_session(session, monkeypatch, capfd, picture, when):
    """At the prompt of a person, who goes on and leaves."""
    lines = iter(["Hello", "/image picture.png", *{"attached": ["What?"], "asked": ["What?", "/retry"]}[when], "/quit"])
    monkeypatch.setattr("builtins.input", lambda prompt: next(lines))
    monkeypatch.setattr("glm4v_jax.cli.chat.chat._use_readline", lambda commands: None)
    read, interrupts = Glm4vImageProcessor.prepare_with_sizes, iter([when == "attached", True, False])

    def interrupted(*arguments):
        if next(interrupts):
            signal.raise_signal(signal.SIGINT)
        return read(*arguments)

    monkeypatch.setattr(Glm4vImageProcessor, "prepare_with_sizes", interrupted)
    Chat()._talk(session)
    assert capfd.readouterr().err.count("stopped; the conversation goes on") == 1
    assert [(turn.text, len(turn.attachments)) for turn in session.turns] == [
        ("Hello", 0),
        ("What?", 0 if when == "attached" else 1),
    ]


def test_a_terminal(tmp_path, picture):
    """Prompts, an answer stopped by Ctrl-C, the session after it, completion, and both ways out."""
    terminal = Terminal("chat", "--greedy", directory=tmp_path, width=200)
    terminal.wait_for("Ctrl-D leaves")
    terminal.wait_for("> ")
    terminal.send("/set max_new_tokens 4000\n")
    terminal.wait_for("max_new_tokens: 4000")
    terminal.send("What is this?\n")
    terminal.wait_for(" one one one one")
    terminal.send("\x03")
    terminal.wait_for("stopped by you]")
    terminal.wait_for("> ")
    terminal.send("/set max_new_tokens 5\n")
    terminal.wait_for("max_new_tokens: 5")
    terminal.send("/ima\tpict\t\n")
    terminal.wait_for("picture.png: 84 × 56 pixels")
    terminal.send("And?\n")
    terminal.wait_for("; length]")
    terminal.wait_for("> ")
    terminal.send("half a li")
    terminal.wait_for("half a li")
    terminal.interrupt()
    terminal.wait_for("Ctrl-C once more, or Ctrl-D, leaves")
    terminal.wait_for("> ")
    terminal.send("/stats\n")
    assert "turns: 2" in terminal.wait_for("encoded: 1")
    terminal.wait_for("> ")
    terminal.interrupt()
    terminal.wait_for("> ")
    terminal.interrupt()
    assert terminal.end() == 0


# A model that thinks, which the random one does not.
SCRIPT = """
from glm4v_jax.generate.completion import Completion, Delta
from glm4v_jax.generate.conversation import Conversation
from glm4v_jax.generate.text.thinking import ThinkingParser

def ask(self, text, **options):
    answer, parser = "<think>Is it a cat?</think><answer>A <|begin_of_box|>cat<|end_of_box|>.", ThinkingParser()
    self.completions.append(Completion(0, answer, (1,) * len(answer), 9, "stop"))
    for character in answer:
        yield Delta(character, tuple(parser.push(character)), (1,))

Conversation.ask = ask
"""


def test_thoughts_are_dim_and_ctrl_d_leaves(tmp_path):
    terminal = Terminal("chat", directory=tmp_path, width=200, before=SCRIPT)
    terminal.wait_for("> ")
    terminal.send("What?\n")
    dim, plain = "\x1b[2;3m", "\x1b[0m"
    thought = "".join(f"{dim}{character}{plain}" for character in "Is it a cat?")
    assert f"{thought}\r\n\r\nA \x1b[1mc{plain}\x1b[1ma{plain}\x1b[1mt{plain}.\r\n" in terminal.wait_for("stop]")
    terminal.wait_for("> ")
    terminal.send("\x04")
    assert terminal.end() == 0


def test_every_error_of_a_command_is_one_that_the_session_survives(session):
    for name in session.commands:
        if name not in ("/quit", "/help", "/stats", "/system", "/preset", "/set"):
            with pytest.raises((Glm4vError, OSError)):
                session.take(name)
    assert session.turns == []
