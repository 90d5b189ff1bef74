"""`glm4v chat`: a conversation in the terminal."""

import contextlib
import dataclasses
import os
import sys
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from glm4v_jax.console.distributed import check_alone
from glm4v_jax.console.options import LongSamplingOptions, MediaOptions, ModelOptions, generation_config, long_answer
from glm4v_jax.console.program import Options
from glm4v_jax.console.progress import status
from glm4v_jax.errors import Glm4vError, MessageError, counted, one_line
from glm4v_jax.inputs.media.quiet import silent_decoders

if TYPE_CHECKING:
    from glm4v_jax.cli.chat.session import Session

PROMPT, CONTINUATION = "> ", ". "


@dataclasses.dataclass(kw_only=True)
class Chat(Options):
    """Chat in the terminal.

    The conversation stays in the KV cache: a turn computes only its new tokens. Thoughts are dim, boxed answers bold.
    /image FILE and /video FILE add media to the next message, /help lists the other commands, Ctrl-C stops an answer.
    If standard input is not a terminal, its lines are the messages; answers go to standard output with their tags,
    everything else to standard error.
    """

    media: MediaOptions = dataclasses.field(default_factory=MediaOptions)
    sampling: LongSamplingOptions = dataclasses.field(default_factory=LongSamplingOptions)
    model: ModelOptions = dataclasses.field(default_factory=ModelOptions)

    def silence(self) -> contextlib.AbstractContextManager[Any]:
        """Silence nothing here: errors of lines, and replies to commands, are written to standard error too."""
        return contextlib.nullcontext()

    def run(self) -> None:
        """Check the options, load the weights, and chat until the user leaves."""
        check_alone("chat")
        self.model.check()
        self.media.check()
        sampling, model = self.sampling, self.model.directory
        default = long_answer(model)
        generation_config(model, sampling.preset, sampling.given(default))

        from glm4v_jax.cli.chat.attachments import attach
        from glm4v_jax.cli.chat.session import Session
        from glm4v_jax.inputs.processor import Glm4vProcessor

        with super().silence():
            with silent_decoders() if not self.verbose else contextlib.nullcontext(), status("preparing"):
                processor = Glm4vProcessor.from_pretrained(model)
                attached = [attach("image", place, processor) for place in self.media.image]
                attached += [attach("video", place, processor, self.media.fps) for place in self.media.video]
            engine = self.model.load(processor)
        given = sampling.given(default_new_tokens=None)
        session = Session(
            engine, model, sampling.system, sampling.preset, given, default, fps=self.media.fps, quiet=self.quiet
        )
        for item in attached:
            session.add(item)
        if sys.stdin.isatty():
            self._talk(session)
        else:
            self._read(session)

    def _talk(self, session: "Session") -> None:
        """With a person: errors are printed, and the conversation continues."""
        from glm4v_jax.cli.chat.commands import COMMANDS

        _use_readline(COMMANDS)
        session.note("/help lists the commands; Ctrl-D leaves")
        was_interrupted = False
        while not session.is_over:
            try:
                line = _next_message()
            except EOFError:
                print(file=sys.stderr)
                return
            except KeyboardInterrupt:
                print(file=sys.stderr)
                if was_interrupted:
                    return
                was_interrupted = True
                session.say("Ctrl-C once more, or Ctrl-D, leaves")
                continue
            was_interrupted = False
            try:
                self._take(session, line)
            except KeyboardInterrupt:
                print(file=sys.stderr)
                session.say("stopped; the conversation continues")

    def _read(self, session: "Session") -> None:
        """With a file or a pipe: the same, with an error at the end if there were any.

        A message whose image or video failed is not asked: nobody is there to see that the answer is not about it.

        Raises:
          MessageError: some lines failed.
        """
        from glm4v_jax.cli.chat.commands import command_name

        failed, lost = 0, ""
        while not session.is_over:
            try:
                line = _next_message()
            except EOFError:
                break
            name = command_name(line)
            if lost and not name and line.strip():
                session.say(f"error: found a message after {lost}, which failed; it was not asked", style="red")
                session.attached, lost = [], ""
                failed += 1
                continue
            is_taken = self._take(session, line)
            failed += not is_taken
            if name in ("/image", "/video") and not is_taken:
                lost = line.strip()
            elif name == "/undo":
                lost = ""
        if failed:
            raise MessageError(f"{counted(failed, 'line')} of the input failed")

    def _take(self, session: "Session", line: str) -> bool:
        """Handle a line; print what is wrong with it, and return whether nothing is."""
        from glm4v_jax.cli.chat.commands import handle

        try:
            handle(session, line)
        except BrokenPipeError:
            raise
        except (Glm4vError, OSError) as error:
            if self.verbose:
                raise
            session.say(f"error: {one_line(error)}", style="red")
            return False
        return True


def _next_message() -> str:
    """Read a line, with its continuation lines; EOFError if there are no more."""
    line = _next_line(PROMPT)
    while line.endswith("\\"):
        line = f"{line[:-1]}\n{_next_line(CONTINUATION)}"
    return line


def _next_line(prompt: str) -> str:
    if not sys.stdin.isatty():
        prompt = ""
    elif not sys.stdout.isatty():
        # `input` would write it among the answers.
        print(prompt, end="", file=sys.stderr, flush=True)
        prompt = ""
    return input(prompt)


def _use_readline(commands: Iterable[str]) -> None:
    """Switch on line editing, history, and completion of commands and file names, where the system has readline."""
    with contextlib.suppress(ImportError):
        import glob
        import readline

        def complete(text: str, state: int) -> str | None:
            line = readline.get_line_buffer()
            if line.startswith("/") and " " not in line:
                found = [f"{command} " for command in commands if command.startswith(line)]
            else:
                found = sorted(glob.glob(f"{glob.escape(os.path.expanduser(text))}*"))
                found = [f"{name}/" if os.path.isdir(name) else name for name in found]
            return found[state] if state < len(found) else None

        readline.set_completer(complete)
        readline.set_completer_delims(" ")
        readline.parse_and_bind("tab: complete")
