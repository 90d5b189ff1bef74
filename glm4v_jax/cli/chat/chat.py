"""`glm4v chat`: a conversation in the terminal."""

import contextlib
import dataclasses
import os
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from glm4v_jax.console.console import status
from glm4v_jax.console.distributed import check_alone
from glm4v_jax.console.options import LongSamplingOptions, MediaOptions, ModelOptions, generation_config, long_answer
from glm4v_jax.errors import Glm4vError, MessageError, one_line
from glm4v_jax.inputs.media.quiet import silent_decoders

if TYPE_CHECKING:
    from glm4v_jax.cli.chat.session import Session

PROMPT, MORE = "> ", ". "


@dataclasses.dataclass(kw_only=True)
class Chat(LongSamplingOptions, MediaOptions, ModelOptions):
    """Lead a conversation: what has been said is kept, and a turn computes only what is new.

    Thoughts are dimmed, boxed answers bold. /image FILE and /video FILE show something with the next message, /help
    lists the other commands, Ctrl-C stops an answer. Where standard input is no terminal its lines are the messages,
    answers go to standard output with their tags, and everything else to standard error.
    """

    def run(self) -> None:
        """Checks the options, loads the weights, and talks until the user leaves."""
        check_alone("chat")
        self.check()
        self.check_media()
        given = self.options(default_new_tokens=None)
        default = long_answer(self.model)
        generation_config(self.model, self.preset, self.options(default))

        from glm4v_jax import Glm4vProcessor
        from glm4v_jax.cli.chat.attachments import attach
        from glm4v_jax.cli.chat.session import Session

        with silent_decoders() if not self.debug else contextlib.nullcontext(), status("preparing"):
            processor = Glm4vProcessor.from_pretrained(self.model)
            attached = [attach("image", place, processor) for place in self.image]
            attached += [attach("video", place, processor) for place in self.video]
        session = Session(self.load(processor), self.model, self.system, self.preset, given, default)
        for item in attached:
            session.add(item)
        if sys.stdin.isatty():
            self._talk(session)
        else:
            self._read(session)

    def _talk(self, session: "Session") -> None:
        """With a person: what is wrong is said, and the conversation goes on."""
        _use_readline(session.commands)
        session.say("/help lists the commands; Ctrl-D leaves")
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
                session.say("stopped; the conversation goes on")

    def _read(self, session: "Session") -> None:
        """With a file or a pipe: the same, and an exit status at the end.

        Raises:
          MessageError: some lines could not be taken.
        """
        failed = 0
        while not session.is_over:
            try:
                line = _next_message()
            except EOFError:
                break
            failed += not self._take(session, line)
        if failed:
            raise MessageError(f"{failed} line{'s' * (failed != 1)} of the input failed")

    def _take(self, session: "Session", line: str) -> bool:
        try:
            session.take(line)
        except BrokenPipeError:
            raise
        except (Glm4vError, OSError) as error:
            if self.debug:
                raise
            session.say(f"error: {one_line(error)}", style="red")
            return False
        return True


def _next_message() -> str:
    """A line, with those that it goes on in.

    Raises:
      EOFError: there are no more.
    """
    line = _next_line(PROMPT)
    while line.endswith("\\"):
        line = f"{line[:-1]}\n{_next_line(MORE)}"
    return line


def _next_line(prompt: str) -> str:
    if not sys.stdin.isatty():
        prompt = ""
    elif not sys.stdout.isatty():
        # `input` would write it among the answers.
        print(prompt, end="", file=sys.stderr, flush=True)
        prompt = ""
    return input(prompt)


def _use_readline(commands: Sequence[str]) -> None:
    """Editing and history of lines, and completion of commands and file names, where the system has them."""
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
