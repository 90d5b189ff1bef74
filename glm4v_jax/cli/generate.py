"""`glm4v generate`: one prompt, streamed; or the many of a file."""

import contextlib
import dataclasses
import shlex
import sys
import time
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from glm4v_jax.console.answer_writer import COMPILING, AnswerWriter, after_status, rate_after_first
from glm4v_jax.console.console import status
from glm4v_jax.console.distributed import DistributedOptions
from glm4v_jax.console.options import MediaOptions, ModelOptions, SamplingOptions, generation_config
from glm4v_jax.errors import GenerationError
from glm4v_jax.files import to_json
from glm4v_jax.generate.completion import Counts, completion_fields
from glm4v_jax.inputs.media.quiet import silent_decoders
from glm4v_jax.inputs.text.messages import user_messages

if TYPE_CHECKING:
    from glm4v_jax.generate.completion import Completion
    from glm4v_jax.inputs.processor import Glm4vProcessor


@dataclasses.dataclass(kw_only=True)
class Generate(SamplingOptions, MediaOptions, DistributedOptions, ModelOptions):
    """Answer a prompt about pictures and videos, or the many prompts of a file.

    The answer goes to standard output while it is made, everything else to standard error. What a new shape compiles is
    kept in $JAX_COMPILATION_CACHE_DIR, or ~/.cache/glm4v_jax/xla.
    """

    # Several words are taken, and refused with better words than a parser's.
    prompt: Annotated[
        tyro.conf.Positional[tuple[str, ...]], tyro.conf.arg(metavar="[PROMPT]", help_behavior_hint="")
    ] = ()
    """What to ask."""

    logprobs: Annotated[int | None, tyro.conf.arg(metavar="N", help_behavior_hint="(default: none)")] = None
    """With --json or --jsonl: log probabilities of the chosen tokens and of the N likeliest."""

    as_json: Annotated[bool, tyro.conf.arg(name="json")] = False
    """Print one JSON object instead of text and figures. Its seconds include compile_seconds: the first call of a shape
    compiles. Its tokens_per_second begin behind the first piece, or are null where there is too little to measure."""

    jsonl: Annotated[str | None, tyro.conf.arg(metavar="FILE", help_behavior_hint="(default: none)")] = None
    """Answer many prompts, one JSON object a line: "prompt" with "image" or "images", "video" or "videos" (paths from
    the file's directory, or addresses), or "messages"; "id", which comes back; and options of the row such as "seed" or
    "max_new_tokens". A run that ended early goes on when called again."""

    out: Annotated[str | None, tyro.conf.arg(metavar="FILE", help_behavior_hint="(default: FILE.answers.jsonl)")] = None
    """With --jsonl: where the answers go, one JSON object a line, as they are completed."""

    slots: Annotated[int, tyro.conf.arg(metavar="N")] = 8
    """With --jsonl: how many prompts are answered at a time."""

    restart: bool = False
    """With --jsonl: do not go on, but replace what is in --out."""

    def run(self) -> None:
        """Checks the options, prepares the inputs, and only then loads the weights, generates and prints."""
        self.check()
        self._check_combination()
        if self.jsonl is not None:
            self._run_many(self.jsonl)
        else:
            self._run_one(*self.prompt)

    def _check_combination(self) -> None:
        """What goes with --jsonl, and what only without.

        Raises:
          GenerationError: found what excludes each other.
        """
        if self.jsonl is None:
            if not self.prompt:
                raise GenerationError("PROMPT: found none, expected one, or --jsonl FILE")
            if len(self.prompt) > 1:
                raise GenerationError(
                    f"PROMPT: found {len(self.prompt)}, expected one; in quotes where it has spaces: "
                    f"{shlex.quote(' '.join(self.prompt))}"
                )
            if not self.prompt[0].strip():
                raise GenerationError(f"PROMPT: found {self.prompt[0]!r}, expected some text")
            given = {"--out": self.out is not None, "--slots": self.slots != 8, "--restart": self.restart}
            if found := [option for option, is_given in given.items() if is_given]:
                raise GenerationError(f"{', '.join(found)}: found without --jsonl, expected with it only")
            if self.logprobs is not None and not self.as_json:
                raise GenerationError("--logprobs: found without --json, expected with it or --jsonl only")
            return
        given = {"PROMPT": bool(self.prompt), "--image": bool(self.image), "--video": bool(self.video)}
        if found := [option for option, is_given in given.items() if is_given]:
            raise GenerationError(f"--jsonl and {', '.join(found)}: found both, expected the file to say it")
        if self.slots < 1:
            raise GenerationError(f"--slots: found {self.slots}, expected at least 1")

    def _all_options(self) -> dict[str, Any]:
        options = self.options()
        return options if self.logprobs is None else {**options, "logprobs": self.logprobs}

    def _run_many(self, jsonl: str) -> None:
        from glm4v_jax.generate.offline.batch import Batch
        from glm4v_jax.generate.offline.prompts import read_rows

        options = self._all_options()
        config = generation_config(self.model, self.preset, options)
        processor = _processor(self.model)
        rows = read_rows(jsonl, config, processor, self.system)
        out = self.out or f"{jsonl.removesuffix('.jsonl')}.answers.jsonl"
        batch = Batch(rows, out, config, self, self.slots, sources=[jsonl])
        summary = batch.run(processor, restart=self.restart)
        if self.as_json:
            print(to_json(summary.fields()))
        summary.raise_if_failed()

    def _run_one(self, text: str) -> None:
        self.check_media()
        from glm4v_jax.config.model import Glm4vConfig

        model_config = Glm4vConfig.from_pretrained(self.model)
        options = self._all_options()
        config = generation_config(self.model, self.preset, options)

        from glm4v_jax.generate.prompt import prompt_of

        with silent_decoders() if not self.debug else contextlib.nullcontext(), status("preparing the inputs"):
            processor = _processor(self.model)
            messages = user_messages(text, self.image, self.video, self.system)
            prompt = prompt_of(messages, processor, model_config)
        limit = model_config.text_config.max_position_embeddings
        config.new_tokens(len(prompt), limit)

        from glm4v_jax.generate.sequence import Answer

        Answer(prompt, config, processor.tokenizer, limit)  # raises where the budgets are too much
        engine = self.load(processor)

        from glm4v_jax.devices.compilation_cache import compile_times

        writer = None if self.as_json else AnswerWriter()
        completion, first, burst = None, 0.0, 0
        started = time.perf_counter()
        with compile_times() as compiled:
            deltas = engine.stream(prompt, preset=self.preset, **options)
            for delta in after_status(deltas, f"generating ({COMPILING})"):
                if not first:
                    first, burst = time.perf_counter() - started, len(delta.tokens)
                if writer is not None:
                    writer.show(delta)
                completion = delta.completion
        seconds = time.perf_counter() - started
        assert completion is not None
        rate = rate_after_first(len(completion.tokens), burst, seconds, first)
        rate = None if rate is None else round(rate, 2)
        times = {
            "seconds": round(seconds, 3),
            "compile_seconds": round(sum(compiled), 3),
            "first_token_seconds": round(first, 3),
        }
        if writer is None:
            fields = completion_fields(completion, processor.tokenizer)
            print(to_json({**fields, **times, "tokens_per_second": rate, "model": self.model}))
            return
        writer.end(completion)
        _print_figures(completion, Counts.of(completion, processor.tokenizer), times, rate)


def _processor(directory: str) -> "Glm4vProcessor":
    from glm4v_jax import Glm4vProcessor

    return Glm4vProcessor.from_pretrained(directory)


def _print_figures(completion: "Completion", counts: Counts, times: dict[str, float], rate: float | None) -> None:
    stop = f" ({completion.stop_string!r})" if completion.stop_string is not None else ""
    kinds = f" ({counts})" if counts.thought else ""
    then = "" if rate is None else f", then {rate:.1f} tokens/s"
    print(
        f"{completion.prompt_tokens} prompt tokens, {len(completion.tokens)} new{kinds} in {times['seconds']:.2f} s, "
        f"{times['compile_seconds']:.2f} s of them compiling, first after {times['first_token_seconds']:.2f} s{then}, "
        f"finish reason: {completion.finish_reason}{stop}",
        file=sys.stderr,
    )
