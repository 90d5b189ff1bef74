"""`glm4v chat`: lines of a pipe, and a person at a terminal."""

import io
import pathlib
import signal
import sys

import pytest
from helpers_checkpoints import RANDOM_CHECKPOINT
from helpers_cli import save_noise
from helpers_terminal import Terminal

from glm4v_jax.cli import main
from glm4v_jax.cli.chat.chat import Chat
from glm4v_jax.inputs.media import load
from glm4v_jax.inputs.media.load import load_image
from glm4v_jax.inputs.vision.image import Glm4vImageProcessor

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("stacked_layers")]


@pytest.fixture
def chat(monkeypatch, capfd):
    """Runs `glm4v chat` on lines of a pipe; returns status, answers and lines of standard error."""

    def run(text, *arguments):
        monkeypatch.setattr(sys, "stdin", io.StringIO(text))
        status = main.main(["chat", *map(str, arguments)])
        captured = capfd.readouterr()
        return status, captured.out, captured.err.splitlines()

    return run


def test_lines_of_a_pipe_are_messages(chat, engine, image):
    text = f"/image {image}\nWhat?\n\nAnd now?\\\nTell me.\n"
    status, out, err = chat(text, "--greedy", "--max-new-tokens", 6)
    conversation = engine.conversation(do_sample=False, max_new_tokens=6)
    first = conversation.send("What?", images=[image])
    second = conversation.send("And now?\nTell me.")
    assert (status, out) == (0, f"{first.text}\n{second.text}\n")
    assert err[0] == "image.png: 84 × 56 pixels, 12 tokens; added to the next message"
    assert err[1].startswith(f"[{first.prompt_tokens} prompt tokens, 6 new")
    assert err[2].startswith(f"[{second.prompt_tokens} prompt tokens (") and "from the cache" in err[2]


def test_options_of_the_command_are_those_of_the_conversation(chat, engine, image, video):
    options = ("--image", image, "--video", video, "--system", "Be brief.", "--max-new-tokens", 5, "--seed", 3)
    status, out, _ = chat("What?", *options, "--preset", "rollouts")
    conversation = engine.conversation("Be brief.", preset="rollouts", max_new_tokens=5, seed=3)
    expected = conversation.send("What?", images=[image], videos=[video])
    assert (status, out) == (0, expected.text + "\n")


def test_the_tiny_model_answers_briefly_by_default(chat, monkeypatch):
    monkeypatch.setattr("glm4v_jax.console.options.TINY_CHECKPOINT", RANDOM_CHECKPOINT)
    assert ", 64 new" in chat("Hello", "--greedy")[2][-1]


def test_a_message_is_not_asked_without_its_image(chat, engine, image):
    text = f"/image nowhere.png\n/image {image}\nWhat is it?\nHello\n/video no.mp4\n/undo\nAgain\n"
    status, out, err = chat(text, "--greedy", "--max-new-tokens", 4)
    answers = [engine.generate(text, do_sample=False, max_new_tokens=4).text for text in ("Hello", "Again")]
    assert (status, out.splitlines()) == (1, answers)
    assert "error: found a message after /image nowhere.png, which failed; it was not asked" in err
    assert err[-1] == "glm4v: error: 3 lines of the input failed"


@pytest.mark.parametrize("kind", ["frames", "video.gif"])
def test_the_rate_of_an_option_is_that_of_all_videos(chat, engine, video, kind):
    pathlib.Path("frames").mkdir()
    for index in range(4):
        save_noise(f"frames/{index}.png", seed=index)
    options = ("--fps", 1, "--greedy", "--max-new-tokens", 4)
    status, out, err = chat(f"/video {kind}\nWhat?\n", *options)
    item = {"type": "video", "video": kind, "fps": 1}
    messages = [{"role": "user", "content": [item, {"type": "text", "text": "What?"}]}]
    expected = engine.generate(messages, do_sample=False, max_new_tokens=4)
    assert (status, out) == (0, f"{expected.text}\n")
    assert f"{2 if kind == 'video.gif' else 4} of 4 frames" in err[0]
    assert chat("What?\n", "--video", kind, *options)[1] == out


def test_an_image_of_an_option_is_read_once(chat, monkeypatch, image):
    read = []

    def reading(place):
        read.append(place)
        return load_image(place)

    monkeypatch.setattr(load, "load_image", reading)
    status, _, err = chat("What?", "--image", image, "--greedy", "--max-new-tokens", 2)
    assert (status, read) == (0, [image])
    assert f"{image}: 84 × 56 pixels, 12 tokens; added to the next message" in err


def test_a_failed_line_is_one_line_of_error_and_the_rest_continues(chat):
    pathlib.Path("notes.png").write_text("not an image")
    text = "/nope\n/image nowhere.png\n/image notes.png\n/set temperature cold\n/save\n/boxes x.png\n/undo\nHello\n"
    status, out, lines = chat(text, "--greedy", "--max-new-tokens", 4)
    assert (status, len(out.splitlines())) == (1, 1)
    beginnings = [
        "error: /nope: found an unknown command; expected one of /image",
        "error: nowhere.png: ",
        "error: notes.png: ",
        "error: temperature: found 'cold'",
        "error: /save: found no file",
        "error: /boxes: found 0 images",
        "error: ",
        "[8 prompt tokens, 4 new",
        "glm4v: error: 7 lines of the input failed",
    ]
    assert len(lines) == len(beginnings)
    assert all(line.startswith(beginning) for line, beginning in zip(lines, beginnings, strict=True)), lines


@pytest.mark.usefixtures("no_weights")
@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--image", "nowhere.png"], ["--image", "nowhere.png"]),
        (["--image", "notes.png"], ["notes.png"]),
        (["--preset", "best"], ["best", "greedy"]),
        (["--greedy", "--top-k", "3"], ["--greedy", "--top-k"]),
        (["--model", "nowhere"], ["--model", "nowhere"]),
    ],
)
def test_an_invalid_option_is_refused_before_weights_are_loaded(chat, arguments, words):
    pathlib.Path("notes.png").write_text("not an image")
    status, out, (line,) = chat("Hello", *arguments)
    assert (status, out) == (1, "")
    assert all(word in line for word in words)


@pytest.mark.parametrize("when", ["attached", "asked"])
def test_an_interrupt_while_an_image_is_read_keeps_the_session(session, monkeypatch, capfd, image, when):
    lines = iter(["Hello", f"/image {image}", *{"attached": ["What?"], "asked": ["What?", "/retry"]}[when], "/quit"])
    monkeypatch.setattr("builtins.input", lambda prompt: next(lines))
    monkeypatch.setattr("glm4v_jax.cli.chat.chat._use_readline", lambda commands: None)
    read, interrupts = Glm4vImageProcessor.prepare_with_sizes, iter([when == "attached", True, False])

    def interrupted(*arguments):
        if next(interrupts):
            signal.raise_signal(signal.SIGINT)
        return read(*arguments)

    monkeypatch.setattr(Glm4vImageProcessor, "prepare_with_sizes", interrupted)
    Chat()._talk(session)
    assert capfd.readouterr().err.count("stopped; the conversation continues") == 1
    with_image = 0 if when == "attached" else 1
    assert [(turn.text, len(turn.attachments)) for turn in session.turns] == [("Hello", 0), ("What?", with_image)]


def test_a_person_at_a_terminal(tmp_path, image):
    """An answer that Ctrl-C stops, the session after it, completion of names, and both ways out."""
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
    terminal.send("/ima\tima\t\n")
    terminal.wait_for("image.png: 84 × 56 pixels")
    terminal.send("And?\n")
    terminal.wait_for(": length]")
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
