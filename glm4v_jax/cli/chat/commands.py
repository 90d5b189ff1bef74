"""The commands of `glm4v chat`: lines that begin with a slash."""

import ast
import dataclasses
import os
import pathlib
from collections.abc import Callable
from typing import Any, NamedTuple

from glm4v_jax.cli.chat.attachments import places
from glm4v_jax.cli.chat.session import Session, UserMessage
from glm4v_jax.cli.chat.transcript import save
from glm4v_jax.config.checks import one_of
from glm4v_jax.config.generation import OF_BEAMS, OF_THE_MODEL
from glm4v_jax.config.presets import PRESETS
from glm4v_jax.errors import GenerationError, MediaError, MessageError, counted
from glm4v_jax.files import replacing

_NOT_FOR_CHAT = (
    *OF_THE_MODEL, *OF_BEAMS, "logits_processor", "logprobs", "logprobs_of", "max_length", "num_return_sequences",
    "pad_token_id", "use_cache",
)  # fmt: skip
"""Fields of `GenerationConfig` that change nothing, or nothing that is shown."""


class ChatCommand(NamedTuple):
    """A command: what runs it, what follows its name, and a line of help."""

    run: Callable[[Session, str], None]
    argument: str
    help: str


def command_name(line: str) -> str:
    """The name of the command that a line is, known or not; "" for a message, which may begin with a path."""
    name = line.strip().partition(" ")[0]
    return name if name in COMMANDS or (name.startswith("/") and not os.path.exists(name)) else ""


def handle(session: Session, line: str) -> None:
    """Handle a line of the user: a command or a message.

    Raises:
      Glm4vError, OSError: what is wrong with it; the conversation is as it was.
    """
    name = command_name(line)
    if name in COMMANDS:
        COMMANDS[name].run(session, line.strip().removeprefix(name).strip())
    elif name:
        raise MessageError(f"{name}: found an unknown command; expected {one_of(COMMANDS, name)}")
    elif line.strip():
        # Images before videos, as `Conversation.ask` puts them.
        attachments = tuple(sorted(session.attached, key=lambda item: item.kind == "video"))
        session.ask(UserMessage(line, attachments))


def _image(session: Session, text: str) -> None:
    for place in places(text):
        session.attach("image", place)


def _video(session: Session, text: str) -> None:
    for place in places(text):
        session.attach("video", place)


def _undo(session: Session, text: str) -> None:
    del text
    if session.attached:
        session.say(f"removed from the next message: {', '.join(item.place for item in session.attached)}")
        session.attached = []
        return
    message = session.undo().text
    session.say(f"removed: {message if len(message) <= 60 else f'{message[:57]}...'}")


def _retry(session: Session, text: str) -> None:
    del text
    message = session.failed
    if message is None:
        if not session.turns:
            raise MessageError("/retry: found no message; expected one to answer again")
        turn = session.undo()
        message = UserMessage(turn.text, turn.attachments)
    session.retries += 1
    session.ask(message)


def _system(session: Session, text: str) -> None:
    session.conversation.system = text or None
    session.say(f"system prompt: {session.conversation.system or 'none'}")


def _preset(session: Session, name: str) -> None:
    if not name:
        for known, what in PRESETS.items():
            session.say(f"{'*' if known == session.preset else ' '} {known:<9} {what.description}")
        return
    session.engine.config(name, **session.options)
    session.preset = name
    session.say(f"preset {name}: {PRESETS[name].description}")


def _set(session: Session, text: str) -> None:
    name, _, value = text.partition(" ")
    name = name.replace("-", "_")
    config = dataclasses.asdict(session.config())
    known = [field for field in config if field not in _NOT_FOR_CHAT]
    if not name:
        session.say(", ".join(f"{field} {config[field]}" for field in known if config[field] not in (None, ())))
        return
    if name not in known:
        raise GenerationError(f"/set: found {name}; expected {one_of(known, name)}")
    options = {field: old for field, old in session.options.items() if field != name}
    if value:
        options[name] = _value(value.strip())
    session.engine.config(session.preset, **options)
    session.options = options
    session.say(f"{name}: {getattr(session.config(), name)}")


def _save(session: Session, text: str) -> None:
    _save_to(session, _path(text, "/save", ".md"), overwrite=False)


def _save_over(session: Session, text: str) -> None:
    _save_to(session, _path(text, "/save!", ".md"), overwrite=True)


def _save_to(session: Session, path: pathlib.Path, *, overwrite: bool) -> None:
    # A file of this session is an earlier state of the same conversation.
    overwrite = overwrite or path.absolute() in session.saved
    tokenizer = session.engine.processor.tokenizer
    save(path, session.model, session.conversation.system, session.turns, tokenizer, overwrite=overwrite)
    session.saved.add(path.absolute())
    session.say(f"{path}: {counted(len(session.turns), 'turn')}")


def _boxes(session: Session, text: str) -> None:
    import PIL.Image

    from glm4v_jax.generate.text.boxes import draw_boxes

    path = _path(text, "/boxes", ".png")
    images = session.images()
    if len(images) != 1:
        raise MediaError(f"/boxes: found {counted(len(images), 'image')} in the conversation; expected one")
    boxes = session.turns[-1].completion.boxes
    if not boxes:
        raise MediaError("/boxes: found no box in the last answer; expected at least one")
    if path.exists() and path.absolute() not in session.saved:
        raise MediaError(f"/boxes: found {path}, which exists; expected another name")
    kind = PIL.Image.registered_extensions().get(path.suffix.lower())
    if kind not in PIL.Image.SAVE:
        raise MediaError(f"/boxes: found {path}; expected a name that ends in .png or .jpg")
    drawn = draw_boxes(images[0], boxes, [str(i) for i in range(1, len(boxes) + 1)])
    try:
        with replacing(path) as aside:
            drawn.save(aside, kind)
    except ValueError as error:
        raise MediaError(f"{path}: {error}") from error
    session.saved.add(path.absolute())
    session.say(f"{path}: {len(boxes)} box{'es' * (len(boxes) != 1)}")


def _stats(session: Session, text: str) -> None:
    del text
    turns = session.turns
    if not turns:
        session.say("no turns")
        return
    completion, pool = turns[-1].completion, session.engine.pool
    prompt = sum(turn.completion.prompt_tokens for turn in turns)
    reused = sum(turn.reused for turn in turns)
    limit = session.engine.runtime.config.text_config.max_position_embeddings
    rates = ", ".join("-" if turn.times.rate is None else f"{turn.times.rate:.1f}" for turn in turns)
    session.say(
        f"turns: {len(turns)}\n"
        f"tokens in the conversation: {completion.prompt_tokens + len(completion.tokens)} of {limit}\n"
        f"prompt tokens: {prompt}, {reused} from the cache ({reused / prompt:.0%})\n"
        f"new tokens: {sum(len(turn.completion.tokens) for turn in turns)}\n"
        f"tokens/s after the first: {rates}\n"
        f"seconds to the first token: {', '.join(f'{turn.times.first:.2f}' for turn in turns)}\n"
        f"images and videos encoded: {pool.encoded}, reused: {pool.reused}"
    )


def _help(session: Session, text: str) -> None:
    del text
    session.say(HELP, style="")


def _quit(session: Session, text: str) -> None:
    del text
    session.is_over = True


COMMANDS = {
    "/image": ChatCommand(_image, "FILE", "add an image to the next message (also several, also an address)"),
    "/video": ChatCommand(_video, "FILE", "add a video to the next message"),
    "/undo": ChatCommand(_undo, "", "remove the last message and its answer, or what was added to the next one"),
    "/retry": ChatCommand(_retry, "", "answer the last message again, with another random seed"),
    "/system": ChatCommand(_system, "TEXT", "set the system prompt; without TEXT, remove it"),
    "/preset": ChatCommand(_preset, "NAME", "use published sampling options; without NAME, list them"),
    "/set": ChatCommand(
        _set, "NAME VALUE", "set an option, as temperature 0.5; without VALUE, reset it; without NAME, list all"
    ),
    "/save": ChatCommand(_save, "FILE", "write the conversation: JSON if FILE ends in .json, else Markdown"),
    "/save!": ChatCommand(_save_over, "FILE", "the same, overwriting an earlier conversation"),
    "/boxes": ChatCommand(_boxes, "FILE", "write the image with the boxes of the last answer"),
    "/stats": ChatCommand(_stats, "", "show counts of tokens and times"),
    "/help": ChatCommand(_help, "", "show this"),
    "/quit": ChatCommand(_quit, "", "leave, as Ctrl-D does"),
}

HELP = "\n".join(
    [
        *(f"{f'{name} {command.argument}':<18}{command.help}" for name, command in COMMANDS.items()),
        "Ctrl-C stops an answer and keeps the part that there is. A line that ends in \\ continues in the next one.",
    ]
)


def _path(text: str, command: str, suffix: str) -> pathlib.Path:
    """The file that a command names, with a suffix if it has none."""
    if not text:
        raise MessageError(f"{command}: found no file; expected its name")
    path = pathlib.Path(os.path.expanduser(text))
    return path if path.suffix or path.is_dir() else path.with_suffix(suffix)


def _value(text: str) -> Any:
    """A number, true or false, a list, or else the text itself."""
    if text.lower() in ("true", "false"):
        return text.lower() == "true"
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError, RecursionError, MemoryError):
        return text
