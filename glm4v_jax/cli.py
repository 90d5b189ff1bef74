"""The command line, `glm4v`: a table of subcommands, each a typed dataclass that runs itself.

Thin on purpose: a subcommand turns options into calls of the public Python interface and prints what comes back. JAX is
imported only once the inputs are known to be good, so that help and complaints are immediate.
"""

import contextlib
import dataclasses
import json
import os
import pathlib
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Annotated, Any, Protocol

import rich.console
import tyro

from glm4v_jax import __version__
from glm4v_jax.compilation_cache import compile_times, use_compilation_cache
from glm4v_jax.data import TINY_CHECKPOINT
from glm4v_jax.errors import CheckpointError, ConfigError, GenerationError, Glm4vError, MediaError

REMOTE_SCHEMES = ("http://", "https://", "data:")
INTERRUPTED = 130
"""Exit status of a shell command that Ctrl-C ended."""
READER_GONE = 141
"""Exit status of a shell command whose reader went away."""
DTYPES = ("auto", "float32", "bfloat16", "float16")

FROM_CHECKPOINT = "(default: the checkpoint's)"


class Command(Protocol):
    """What the table of subcommands holds."""

    debug: bool

    def run(self) -> None:
        """Does the work; raises `Glm4vError` or `OSError` for what the user can mend."""


@dataclasses.dataclass
class Generate:
    """Answer a prompt about pictures and videos.

    What a new shape compiles is kept in $JAX_COMPILATION_CACHE_DIR, or ~/.cache/glm4v_jax/xla.
    """

    prompt: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="PROMPT")]
    """What to ask."""

    model: Annotated[
        str, tyro.conf.arg(metavar="DIR", help_behavior_hint="(default: a tiny random one in the package)")
    ] = str(TINY_CHECKPOINT)
    """Directory of a GLM-4.1V checkpoint in Hugging Face layout."""

    image: Annotated[tyro.conf.UseAppendAction[tuple[str, ...]], tyro.conf.arg(metavar="F")] = ()
    """A picture: path or http(s) address."""

    video: Annotated[tyro.conf.UseAppendAction[tuple[str, ...]], tyro.conf.arg(metavar="F")] = ()
    """A video: path or http(s) address. Videos come after the pictures."""

    max_new_tokens: Annotated[int, tyro.conf.arg(metavar="N")] = 128
    """Stop after this many tokens at the latest."""

    do_sample: bool = False
    """Draw the next token, whatever the checkpoint says."""

    greedy: bool = False
    """Take the likeliest next token, whatever the checkpoint says."""

    temperature: Annotated[float | None, tyro.conf.arg(metavar="T", help_behavior_hint=FROM_CHECKPOINT)] = None
    """Divides the logits before a token is drawn."""

    top_k: Annotated[int | None, tyro.conf.arg(metavar="K", help_behavior_hint=FROM_CHECKPOINT)] = None
    """Draw among the K likeliest tokens."""

    top_p: Annotated[float | None, tyro.conf.arg(metavar="P", help_behavior_hint=FROM_CHECKPOINT)] = None
    """Draw among the likeliest tokens that together reach this probability."""

    min_p: Annotated[float | None, tyro.conf.arg(metavar="P", help_behavior_hint=FROM_CHECKPOINT)] = None
    """Draw among tokens at least this probable, relative to the likeliest."""

    repetition_penalty: Annotated[float | None, tyro.conf.arg(metavar="R", help_behavior_hint=FROM_CHECKPOINT)] = None
    """Over 1: makes tokens that occurred already less likely."""

    seed: int = 0
    """Of the draws."""

    dtype: Annotated[
        # Not a Literal with None: tyro would offer None among the choices.
        str | None,
        tyro.conf.arg(
            metavar=f"{{{','.join(DTYPES)}}}", help_behavior_hint="(default: float32 on a CPU, bfloat16 elsewhere)"
        ),
    ] = None
    """Of the weights and the arithmetic; auto is the checkpoint's."""

    as_json: Annotated[bool, tyro.conf.arg(name="json")] = False
    """Print one JSON object instead of text and figures. Its seconds include compile_seconds: the first call of a shape
    compiles."""

    debug: bool = False
    """Show the whole traceback of an error."""

    def run(self) -> None:
        """Checks the options, prepares the inputs, and only then loads the weights, generates and prints."""
        self._check_places()
        from glm4v_jax.config import Glm4vConfig
        from glm4v_jax.generate.config import GenerationConfig

        config = Glm4vConfig.from_pretrained(self.model)
        options = self._options()
        generation = GenerationConfig.from_pretrained(self.model).replace(**options)

        from glm4v_jax import Glm4vProcessor

        with _silent_decoders() if not self.debug else contextlib.nullcontext(), _status("preparing the inputs"):
            processor = Glm4vProcessor.from_pretrained(self.model)
            inputs = processor.apply_chat_template(
                self._messages(), add_generation_prompt=True, tokenize=True, return_dict=True, padding=True
            )
        prompt_tokens = inputs["input_ids"].shape[1]
        generation.new_tokens(prompt_tokens, config.text_config.max_position_embeddings)

        use_compilation_cache()
        from glm4v_jax import Glm4vForConditionalGeneration

        with _status("loading the weights"):
            model = Glm4vForConditionalGeneration.from_pretrained(self.model, dtype=self.dtype)
        started = time.perf_counter()
        with _status("generating"), compile_times() as compiled:
            ids = model.generate(**inputs, **options)
        seconds = time.perf_counter() - started

        new_ids = ids[0, prompt_tokens:]
        answer = {
            "text": processor.decode(new_ids, skip_special_tokens=True),
            "prompt_tokens": prompt_tokens,
            "new_tokens": len(new_ids),
            "seconds": round(seconds, 3),
            "compile_seconds": round(sum(compiled), 3),
            "tokens_per_second": round(len(new_ids) / seconds, 2),
            "finish_reason": "stop" if int(new_ids[-1]) in generation.eos_token_id else "length",
            "model": self.model,
        }
        if self.as_json:
            print(json.dumps(answer))
            return
        print(answer["text"], flush=True)
        print(
            f"{prompt_tokens} prompt tokens, {len(new_ids)} new in {seconds:.2f} s, {sum(compiled):.2f} s of them "
            f"compiling ({answer['tokens_per_second']} tokens/s), finish reason: {answer['finish_reason']}",
            file=sys.stderr,
        )

    def _check_places(self) -> None:
        """Misses a directory or a file before anything slow begins."""
        # Not pathlib: it takes an empty name for the current directory.
        if not os.path.isdir(self.model):
            raise CheckpointError(
                f"--model {self.model or repr(self.model)}: not a directory; nothing is downloaded: give the directory "
                "of a downloaded checkpoint"
            )
        for option, places in (("--image", self.image), ("--video", self.video)):
            for place in places:
                if not place.startswith(REMOTE_SCHEMES) and not pathlib.Path(place).exists():
                    raise MediaError(f"{option} {place}: there is no such file or directory")

    def _messages(self) -> list[dict[str, Any]]:
        """One turn of the user: pictures, videos, text."""
        media = [{"type": "image", "url": place} for place in self.image]
        media += [{"type": "video", "url": place} for place in self.video]
        return [{"role": "user", "content": [*media, {"type": "text", "text": self.prompt}]}]

    def _options(self) -> dict[str, Any]:
        """The options of the generation that were given: for others the checkpoint's generation_config.json speaks."""
        if self.greedy and self.do_sample:
            raise GenerationError("--greedy and --do-sample: found both, expected one of them at most")
        drawing = {
            "--temperature": self.temperature,
            "--top-k": self.top_k,
            "--top-p": self.top_p,
            "--min-p": self.min_p,
        }
        if self.greedy and (found := [option for option, value in drawing.items() if value is not None]):
            raise GenerationError(f"--greedy and {', '.join(found)}: found both, expected one; --greedy draws nothing")
        if self.temperature == 0:
            raise GenerationError(
                "--temperature: found 0, expected a number above 0; for the likeliest token: --greedy"
            )
        if self.dtype is not None and self.dtype not in DTYPES:
            raise ConfigError(f"--dtype: found {self.dtype}, expected one of {', '.join(DTYPES)}")
        given = {
            "max_new_tokens": self.max_new_tokens,
            "do_sample": True if self.do_sample else False if self.greedy else None,
            "temperature": self.temperature,
            "top_k": self.top_k,
            "top_p": self.top_p,
            "min_p": self.min_p,
            "repetition_penalty": self.repetition_penalty,
            "seed": self.seed,
        }
        return {name: value for name, value in given.items() if value is not None}


COMMANDS: dict[str, Callable[..., Command]] = {
    "generate": Generate,
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one subcommand.

    Args:
        arguments: what follows the program's name; that of this process by default.

    Returns:
        The exit status: 0, or 1 after one line on standard error that says what is wrong. An unknown option exits
        with status 2 by `SystemExit`.
    """
    try:
        status = _run(sys.argv[1:] if arguments is None else arguments)
        sys.stdout.flush()
    except BrokenPipeError:
        # Python flushes once more at its end, which must not fail; see the documentation of SIGPIPE in `signal`.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return READER_GONE
    return status


def _run(arguments: Sequence[str]) -> int:
    if list(arguments) == ["--version"]:
        print(f"glm4v {__version__}")
        return 0
    command = _parse(arguments)
    try:
        command.run()
    except BrokenPipeError:
        raise
    except (Glm4vError, OSError) as error:
        if command.debug:
            raise
        print(f"glm4v: error: {_one_line(error)}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return INTERRUPTED
    return 0


def _parse(arguments: Sequence[str]) -> Command:
    config = (tyro.conf.FlagCreatePairsOff,)
    if arguments and arguments[0] in COMMANDS:
        # By itself, so that complaints name the subcommand's help and not that of the program.
        name, *options = arguments
        return tyro.cli(COMMANDS[name], prog=f"glm4v {name}", args=options, config=config)
    return tyro.extras.subcommand_cli_from_dict(
        COMMANDS,
        prog="glm4v",
        description="GLM-4.1V in JAX: pictures, videos and text in, text out. `glm4v --version` prints the version.",
        args=arguments,
        config=config,
    )


def _one_line(error: Exception) -> str:
    if isinstance(error, OSError) and error.filename is not None:
        return f"{error.filename}: {error.strerror}"
    return " ".join(str(error).split())


@contextlib.contextmanager
def _status(text: str) -> Iterator[None]:
    """Says what is going on, to a person: where standard error is no terminal, nothing is shown."""
    console = rich.console.Console(stderr=True)
    with console.status(text) if console.is_terminal else contextlib.nullcontext():
        yield


@contextlib.contextmanager
def _silent_decoders() -> Iterator[None]:
    """Keeps what C libraries log to file descriptor 2 off the screen: the exception says it in words of ours.

    FFmpeg inside decord complains there before Python hears of it. Python's own standard error is not affected.
    """
    screen = os.dup(2)
    with open(screen, "w", encoding=sys.stderr.encoding) as python_stderr, open(os.devnull, "w") as nowhere:
        sys.stderr.flush()
        os.dup2(nowhere.fileno(), 2)
        try:
            with contextlib.redirect_stderr(python_stderr):
                yield
        finally:
            os.dup2(screen, 2)
