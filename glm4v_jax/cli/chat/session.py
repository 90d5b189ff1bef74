"""A conversation in `glm4v chat`: its options and attachments, and how an answer is generated and shown."""

import dataclasses
import pathlib
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Literal

import rich.console
import rich.text

from glm4v_jax.cli.chat.attachments import Attachment, attach
from glm4v_jax.cli.chat.transcript import Turn
from glm4v_jax.config.presets import preset
from glm4v_jax.console.answer_writer import AnswerWriter, Stopwatch, after_status, figures
from glm4v_jax.console.interrupts import Interrupt
from glm4v_jax.console.options import with_default
from glm4v_jax.console.progress import status
from glm4v_jax.console.table import printable
from glm4v_jax.generate.completion import Counts
from glm4v_jax.inputs.media.quiet import silent_decoders

if TYPE_CHECKING:
    import PIL.Image

    from glm4v_jax.config.generation import GenerationConfig
    from glm4v_jax.generate.engine import Engine


@dataclasses.dataclass(frozen=True)
class UserMessage:
    """A message to ask."""

    text: str
    attachments: tuple[Attachment, ...]


class Session:
    """A conversation, and what belongs to it on the user's side.

    Attributes:
      engine: generates.
      conversation: the engine's.
      model: the name of the model.
      turns: those of the conversation.
      attached: images and videos for the next message.
      failed: the last message, if it has no answer.
      preset: name of the sampling options; see `PRESETS`.
      options: fields of `GenerationConfig` that override the preset's.
      retries: number of `/retry`; it changes the seed.
      saved: files that this session has written, and may overwrite.
      is_over: whether the user wants to leave.
    """

    def __init__(
        self,
        engine: "Engine",
        model: str,
        system: str | None,
        preset_name: str | None,
        options: Mapping[str, Any],
        default_new_tokens: int,
        *,
        fps: float | None = None,
        quiet: bool = False,
        writer: Callable[[], AnswerWriter] = AnswerWriter,
    ):
        """Begin; `options` are fields of `GenerationConfig` that override the preset's.

        `default_new_tokens` is for where neither of them has `max_new_tokens`; `quiet`: `note` prints nothing.
        """
        self.engine, self.model, self.preset, self.options = engine, model, preset_name, dict(options)
        self.conversation = engine.conversation(system)
        self.turns: list[Turn] = []
        self.attached: list[Attachment] = []
        self.failed: UserMessage | None = None
        self.retries = 0
        self.saved: set[pathlib.Path] = set()
        self.is_over = False
        self._default_new_tokens, self._fps = default_new_tokens, fps
        self._quiet, self._writer = quiet, writer
        self._console = rich.console.Console(stderr=True, highlight=False)
        self.config()

    def say(self, line: str, style: str = "dim") -> None:
        """Print a line to the user, on standard error."""
        self._console.print(rich.text.Text(printable(line), style=style), soft_wrap=True)

    def note(self, line: str) -> None:
        """Print a line that nobody has asked for."""
        if not self._quiet:
            self.say(line)

    def attach(self, kind: Literal["image", "video"], place: str) -> None:
        """Load an image or video for the next message.

        Raises:
          MediaError: what is wrong with it.
        """
        with silent_decoders(), status(f"reading {place}"):
            attached = attach(kind, place, self.engine.processor, self._fps)
        self.add(attached)

    def add(self, attached: Attachment) -> None:
        """Add a loaded image or video to the next message."""
        self.attached.append(attached)
        self.note(f"{attached.place}: {attached.about}; added to the next message")

    def ask(self, message: UserMessage) -> None:
        """Ask, and show the answer until it ends or Ctrl-C stops it.

        Raises:
          Glm4vError: what is wrong with the message; `/retry` tries it again.
          KeyboardInterrupt: Ctrl-C while images and videos are read, or a second one before the answer has stopped; the
            part of the answer that there is stays, and `/retry` tries a message without an answer again.
        """
        from glm4v_jax.devices.compilation_cache import compile_times
        from glm4v_jax.generate.warmup import programs

        self.failed = message
        stats, writer = self.engine.stats, self._writer()
        before, reused = dataclasses.replace(stats), 0
        number = len(self.conversation.completions)
        with silent_decoders(), status("reading"):
            deltas = self.conversation.ask(
                message.text,
                images=[item.source for item in message.attachments if item.kind == "image"],
                videos=[item.source for item in message.attachments if item.kind == "video"],
                preset=self.preset,
                **self.all_options(),
            )
        with Interrupt() as interrupt, compile_times() as compiled:
            watch = Stopwatch(compiled)
            shown = after_status(deltas, programs(bool(message.attachments)))
            try:
                for delta in shown:
                    if not watch.first:
                        # Not later: closing a thought runs a prompt too.
                        reused = (stats.prompt_tokens - before.prompt_tokens) - (
                            stats.prefill_tokens - before.prefill_tokens
                        )
                    watch.note(delta)
                    writer.show(delta)
                    if interrupt.is_set:
                        break
            finally:
                # Stops the answer; afterwards the part that there is belongs to the conversation, whatever stopped it.
                shown.close()  # type: ignore[attr-defined]
                deltas.close()  # type: ignore[attr-defined]
                if len(self.conversation.completions) > number:
                    completion = self.conversation.completions[-1]
                    times = watch.stop(len(completion.tokens))
                    self._end(Turn(message.text, message.attachments, completion, reused, times), writer)

    def undo(self) -> Turn:
        """Remove the last turn.

        Raises:
          GenerationError: there is none.
        """
        self.conversation.undo()
        return self.turns.pop()

    def all_options(self, options: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """Fields of `GenerationConfig` for the next answer; of other options than `self.options`, if given."""
        options = self.options if options is None else options
        from_preset = {} if self.preset is None else preset(self.preset)
        max_new_tokens = with_default(options.get("max_new_tokens"), from_preset, self._default_new_tokens)
        # Another seed for a retry, or the answer would be the same.
        seed = (options.get("seed", 0) + self.retries) % 2**32
        return {**options, "max_new_tokens": max_new_tokens, "seed": seed}

    def config(self, options: Mapping[str, Any] | None = None) -> "GenerationConfig":
        """What `all_options` and the preset amount to.

        Raises:
          GenerationError: an option is unknown or out of its range.
        """
        return self.engine.config(self.preset, **self.all_options(options))

    def images(self) -> list["PIL.Image.Image"]:
        """All images of the conversation."""
        return [item.source for turn in self.turns for item in turn.attachments if item.kind == "image"]

    def _end(self, turn: Turn, writer: AnswerWriter) -> None:
        """Keep a turn, and print its figures."""
        self.turns.append(turn)
        self.failed = None
        # Not by comparing: the same file may be attached twice.
        carried = {id(item) for item in turn.attachments}
        self.attached = [item for item in self.attached if id(item) not in carried]
        completion = turn.completion
        writer.end(completion)
        counts = Counts.of(completion, self.engine.processor.tokenizer)
        self.note(f"[{figures(completion, counts, turn.times, turn.reused)}]")
        if completion.boxes and len(self.images()) == 1:
            boxes = ", ".join(str(list(box)) for box in completion.pixel_boxes())
            self.note(f"boxes in pixels: {boxes}; /boxes FILE draws them")
