"""A conversation as a person leads it in `glm4v chat`: messages, and commands that begin with a slash."""

import ast
import dataclasses
import os
import pathlib
import time
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Literal

import rich.console
import rich.text

from glm4v_jax.cli.chat.attachments import Attachment, attach, places
from glm4v_jax.cli.chat.interrupt import Interrupt
from glm4v_jax.cli.chat.transcript import Turn, save
from glm4v_jax.config.presets import PRESETS, preset
from glm4v_jax.console.answer_writer import AnswerWriter, after_status, rate_after_first
from glm4v_jax.console.options import with_default
from glm4v_jax.console.progress import COMPILING, status
from glm4v_jax.console.table import printable
from glm4v_jax.errors import GenerationError, MediaError, MessageError
from glm4v_jax.files import replacing
from glm4v_jax.generate.completion import Counts
from glm4v_jax.inputs.media.quiet import silent_decoders

if TYPE_CHECKING:
    import PIL.Image

    from glm4v_jax.generate.engine import Engine

HELP = """\
/image FILE       show a picture with the next message (also several, also an address)
/video FILE       show a video with the next message
/undo             forget the last message and its answer, or what was to be shown
/retry            answer the last message again; what is drawn is drawn anew
/system TEXT      what the system says first; without TEXT nothing
/preset NAME      published sampling options; without NAME those there are
/set NAME VALUE   an option of the generation, such as temperature 0.5; without VALUE back to the default
/save FILE        write the conversation: Markdown, or JSON where FILE ends in .json; /save! replaces an earlier one
/boxes FILE       save the picture with the boxes of the last answer drawn on it
/stats            tokens and times
/quit             leave; so does Ctrl-D
Ctrl-C stops an answer and keeps what there is of it. A line that ends in \\ goes on in the next one."""

_LEAST_COMPILED = 0.5
"""Seconds of compiling that a person is told of."""

_NOT_OF_A_CHAT = ("logprobs", "max_length", "num_return_sequences", "pad_token_id", "use_cache")
"""Fields of `GenerationConfig` that change nothing of a conversation, or nothing that it shows."""


@dataclasses.dataclass(frozen=True)
class Message:
    """What is to be said."""

    text: str
    attachments: tuple[Attachment, ...]


class Session:
    """A conversation with what belongs to it on this side of the screen.

    Attributes:
      turns: those that are in the conversation.
      is_over: whether the user has asked to leave.
    """

    def __init__(
        self,
        engine: "Engine",
        model: str,
        system: str | None,
        preset_name: str | None,
        options: Mapping[str, Any],
        default_new_tokens: int,
    ):
        """Begin.

        Args:
          engine: what answers.
          model: what the model is called.
          system: what the system says first.
          preset_name: of the sampling options; see `PRESETS`.
          options: fields of `GenerationConfig` that go over the preset's.
          default_new_tokens: `max_new_tokens` where neither options nor preset say it.
        """
        self.turns: list[Turn] = []
        self.is_over = False
        self._engine, self._model, self._preset = engine, model, preset_name
        self._options, self._default_new_tokens = dict(options), default_new_tokens
        self._conversation = engine.conversation(system)
        self._attached: list[Attachment] = []
        self._failed: Message | None = None
        self._retries = 0
        self._saved: set[pathlib.Path] = set()
        self._console = rich.console.Console(stderr=True, highlight=False)
        self._commands: dict[str, Callable[[str], None]] = {
            "image": self._image,
            "video": self._video,
            "undo": self._undo,
            "retry": self._retry,
            "system": self._set_system,
            "preset": self._set_preset,
            "set": self._set,
            "save": self._save,
            "save!": self._save_over,
            "boxes": self._boxes,
            "stats": self._stats,
            "help": self._help,
            "quit": self._quit,
        }
        self._engine.config(self._preset, **self._all_options())

    @property
    def commands(self) -> list[str]:
        """Names of the commands, with the slash."""
        return [f"/{name}" for name in self._commands]

    def say(self, line: str, style: str = "dim") -> None:
        """Tells the user something beside the conversation, on standard error."""
        self._console.print(rich.text.Text(printable(line), style=style), soft_wrap=True)

    def take(self, line: str) -> None:
        """Takes a line of the user: a command or a message.

        Raises:
          Glm4vError, OSError: what is wrong with it; the conversation is as it was.
        """
        name, _, rest = line.strip().partition(" ")
        command = self._commands.get(name[1:]) if name.startswith("/") else None
        # A path may begin a message, but does not take a command's place.
        if command is None and (not name.startswith("/") or os.path.exists(name)):
            if line.strip():
                self.ask(Message(line, self._ordered()))
            return
        if command is None:
            raise MessageError(f"{name}: found no such command, expected one of {', '.join(self.commands)}")
        command(rest.strip())

    def attach(self, kind: Literal["image", "video"], place: str) -> None:
        """Loads a picture or video, which is shown with the next message.

        Raises:
          MediaError: what is wrong with it.
        """
        with silent_decoders(), status(f"reading {place}"):
            attached = attach(kind, place, self._engine.processor)
        self.add(attached)

    def add(self, attached: Attachment) -> None:
        """Shows what is loaded already with the next message."""
        self._attached.append(attached)
        self.say(f"{attached.place}: {attached.about}; goes with the next message")

    def ask(self, message: Message) -> None:
        """Says something and shows the answer, until it ends or Ctrl-C stops it.

        Raises:
          Glm4vError: what is wrong with it; `/retry` tries it again.
          KeyboardInterrupt: Ctrl-C came while pictures and videos were read, or a second one before the answer had
            stopped; what there is of an answer is kept, and `/retry` tries again what has none.
        """
        from glm4v_jax.devices.compilation_cache import compile_times

        self._failed = message
        stats, writer = self._engine.stats, AnswerWriter()
        before, reused, first, burst = dataclasses.replace(stats), 0, 0.0, 0
        number = len(self._conversation.completions)
        started = time.perf_counter()
        with silent_decoders(), status("reading"):
            deltas = self._conversation.ask(
                message.text,
                images=[item.source for item in message.attachments if item.kind == "image"],
                videos=[item.source for item in message.attachments if item.kind == "video"],
                preset=self._preset,
                **self._all_options(),
            )
        with Interrupt() as interrupt, compile_times() as compiled:
            shown = after_status(deltas, f"answering ({COMPILING})")
            try:
                for delta in shown:
                    if not first:
                        first, burst = time.perf_counter() - started, len(delta.tokens)
                        # Not later: a thought that has to be closed runs a prompt too.
                        reused = (stats.prompt_tokens - before.prompt_tokens) - (
                            stats.prefill_tokens - before.prefill_tokens
                        )
                    writer.show(delta)
                    if interrupt.is_set:
                        break
            finally:
                # Stops the answer; what there is of it is in the conversation afterwards, whatever stopped it.
                shown.close()  # type: ignore[attr-defined]
                deltas.close()  # type: ignore[attr-defined]
                if len(self._conversation.completions) > number:
                    completion = self._conversation.completions[-1]
                    seconds = time.perf_counter() - started
                    rate = rate_after_first(len(completion.tokens), burst, seconds, first)
                    figures = (reused, seconds, sum(compiled), first, rate)
                    self._end(Turn(message.text, message.attachments, completion, *figures), writer)

    def _end(self, turn: Turn, writer: AnswerWriter) -> None:
        """Keeps a turn, and says what there is to say about its answer."""
        self.turns.append(turn)
        self._failed = None
        # Not by comparing: the same file may be shown twice.
        carried = {id(item) for item in turn.attachments}
        self._attached = [item for item in self._attached if id(item) not in carried]
        completion = turn.completion
        writer.end(completion)
        self.say(self._figures(turn))
        if completion.boxes and len(self._pictures()) == 1:
            boxes = ", ".join(str(list(box)) for box in completion.pixel_boxes())
            self.say(f"boxes in pixels: {boxes}; /boxes FILE draws them")

    def _all_options(self) -> dict[str, Any]:
        from_preset = {} if self._preset is None else preset(self._preset)
        given = self._options.get("max_new_tokens")
        most = with_default(given, from_preset, self._default_new_tokens)
        # Not the same draws in every turn.
        seed = (self._options.get("seed", 0) + self._retries) % 2**32
        return {**self._options, "max_new_tokens": most, "seed": seed}

    def _ordered(self) -> tuple[Attachment, ...]:
        """Pictures before videos, as `Conversation.ask` puts them."""
        return tuple(sorted(self._attached, key=_is_video))

    def _figures(self, turn: Turn) -> str:
        completion = turn.completion
        counts = Counts.of(completion, self._engine.processor.tokenizer)
        kinds = f" ({counts})" if counts.thought else ""
        reused = f", {turn.reused} of them from the cache" if turn.reused else ""
        compiled = f", {turn.compiled:.1f} s of them compiling" if turn.compiled > _LEAST_COMPILED else ""
        reason = "stopped by you" if completion.finish_reason == "cancelled" else completion.finish_reason
        return (
            f"[{completion.prompt_tokens} prompt tokens{reused}; {len(completion.tokens)} new{kinds} in "
            f"{turn.seconds:.2f} s{compiled}, first after {turn.first:.2f} s{_then(turn)}; {reason}]"
        )

    def _pictures(self) -> list["PIL.Image.Image"]:
        return [item.source for turn in self.turns for item in turn.attachments if item.kind == "image"]

    def _image(self, text: str) -> None:
        for place in places(text):
            self.attach("image", place)

    def _video(self, text: str) -> None:
        for place in places(text):
            self.attach("video", place)

    def _undo(self, text: str) -> None:
        del text
        if self._attached:
            self.say(f"not shown with the next message: {', '.join(item.place for item in self._attached)}")
            self._attached = []
            return
        self._conversation.undo()
        turn = self.turns.pop()
        self.say(f"forgotten: {_shortened(turn.text)}")

    def _retry(self, text: str) -> None:
        del text
        message = self._failed
        if message is None:
            if not self.turns:
                raise MessageError("/retry: found no message, expected one to answer again")
            self._conversation.undo()
            turn = self.turns.pop()
            message = Message(turn.text, turn.attachments)
        self._retries += 1
        self.ask(message)

    def _set_system(self, text: str) -> None:
        self._conversation.system = text or None
        self.say(f"system: {self._conversation.system or 'nothing'}")

    def _set_preset(self, name: str) -> None:
        if not name:
            for known, what in PRESETS.items():
                self.say(f"{'*' if known == self._preset else ' '} {known:<9} {what.description}")
            return
        self._engine.config(name, **self._options)
        self._preset = name
        self.say(f"preset {name}: {PRESETS[name].description}")

    def _set(self, text: str) -> None:
        name, _, value = text.partition(" ")
        name = name.replace("-", "_")
        config = dataclasses.asdict(self._engine.config(self._preset, **self._all_options()))
        useful = [known for known in config if known not in _NOT_OF_A_CHAT]
        if not name:
            shown = {known: config[known] for known in useful if config[known] not in (None, ())}
            self.say(", ".join(f"{name} {value}" for name, value in shown.items()))
            return
        if name not in useful:
            raise GenerationError(f"/set {name}: found no option of a chat, expected one of {', '.join(useful)}")
        options = {known: old for known, old in self._options.items() if known != name}
        if value:
            options[name] = _value(value.strip())
        self._engine.config(self._preset, **options)
        self._options = options
        now = getattr(self._engine.config(self._preset, **self._all_options()), name)
        self.say(f"{name}: {now}")

    def _save(self, text: str) -> None:
        self._save_to(text, overwrite=False)

    def _save_over(self, text: str) -> None:
        self._save_to(text, overwrite=True)

    def _save_to(self, text: str, *, overwrite: bool) -> None:
        path = _path(text, "/save", ".md")
        # What this conversation has written already is an earlier state of the same.
        overwrite = overwrite or path.absolute() in self._saved
        tokenizer = self._engine.processor.tokenizer
        save(path, self._model, self._conversation.system, self.turns, tokenizer, overwrite=overwrite)
        self._saved.add(path.absolute())
        self.say(f"{path}: {len(self.turns)} turn{'s' * (len(self.turns) != 1)}")

    def _boxes(self, text: str) -> None:
        import PIL.Image

        from glm4v_jax.generate.text.boxes import draw_boxes

        path = _path(text, "/boxes", ".png")
        pictures = self._pictures()
        if len(pictures) != 1:
            raise MediaError(f"/boxes: found {len(pictures)} pictures in the conversation, expected exactly one")
        boxes = self.turns[-1].completion.boxes
        if not boxes:
            raise MediaError("/boxes: found no box in the last answer, expected at least one")
        if path.exists() and path.absolute() not in self._saved:
            raise MediaError(f"{path}: is there already, expected another name")
        kind = PIL.Image.registered_extensions().get(path.suffix.lower())
        if kind not in PIL.Image.SAVE:
            raise MediaError(f"{path}: unknown format of pictures, expected a name that ends in .png or .jpg")
        drawn = draw_boxes(pictures[0], boxes, [str(i) for i in range(1, len(boxes) + 1)])
        try:
            with replacing(path) as aside:
                drawn.save(aside, kind)
        except ValueError as error:
            raise MediaError(f"{path}: {error}") from error
        self._saved.add(path.absolute())
        self.say(f"{path}: {len(boxes)} box{'es' * (len(boxes) != 1)}")

    def _stats(self, text: str) -> None:
        del text
        if not self.turns:
            self.say("nothing has been said")
            return
        last = self.turns[-1]
        prompt = sum(turn.completion.prompt_tokens for turn in self.turns)
        reused = sum(turn.reused for turn in self.turns)
        new = sum(len(turn.completion.tokens) for turn in self.turns)
        limit = self._engine.runtime.config.text_config.max_position_embeddings
        pool = self._engine.pool
        rates = ", ".join("-" if turn.rate is None else f"{turn.rate:.1f}" for turn in self.turns)
        firsts = ", ".join(f"{turn.first:.2f}" for turn in self.turns)
        self.say(
            f"turns: {len(self.turns)}\n"
            f"tokens in the conversation: {last.completion.prompt_tokens + len(last.completion.tokens)} of {limit}\n"
            f"tokens of prompts: {prompt}, {reused} of them from the cache ({reused / prompt:.0%})\n"
            f"new tokens: {new}\n"
            f"tokens/s after the first: {rates}\n"
            f"seconds to the first token: {firsts}\n"
            f"pictures and videos encoded: {pool.encoded}, taken from before: {pool.reused}"
        )

    def _help(self, text: str) -> None:
        del text
        self.say(HELP, style="")

    def _quit(self, text: str) -> None:
        del text
        self.is_over = True


def _is_video(attachment: Attachment) -> bool:
    return attachment.kind == "video"


def _path(text: str, command: str, suffix: str) -> pathlib.Path:
    """The file that a command names, with a suffix if it has none."""
    if not text:
        raise MessageError(f"{command}: found no file, expected its name")
    path = pathlib.Path(os.path.expanduser(text))
    return path if path.suffix or path.is_dir() else path.with_suffix(suffix)


def _then(turn: Turn) -> str:
    return "" if turn.rate is None else f", then {turn.rate:.1f} tokens/s"


def _shortened(text: str) -> str:
    return text if len(text) <= 60 else f"{text[:57]}..."


def _value(text: str) -> Any:
    """A number, true or false, a list, or else the text itself."""
    if text.lower() in ("true", "false"):
        return text.lower() == "true"
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError, RecursionError, MemoryError):
        return text
