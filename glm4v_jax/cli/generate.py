"""`glm4v generate`: one prompt, streamed; or the many of a file."""

import contextlib
import dataclasses
import json
import shlex
import sys
from typing import Annotated, Any

import tyro

from glm4v_jax.config.checks import Positive
from glm4v_jax.console.answer_writer import AnswerWriter, Stopwatch, after_status, figures
from glm4v_jax.console.distributed import DistributedOptions
from glm4v_jax.console.options import MediaOptions, ModelOptions, SamplingOptions, generation_config, json_text
from glm4v_jax.console.program import JsonOptions
from glm4v_jax.console.progress import run_batch, status
from glm4v_jax.errors import GenerationError
from glm4v_jax.files import to_json
from glm4v_jax.inputs.media.quiet import silent_decoders

SLOTS = 8


@dataclasses.dataclass(kw_only=True)
class BatchOptions:
    """Many prompts from a file."""

    jsonl: Annotated[str | None, tyro.conf.arg(metavar="FILE")] = None
    """Answer many prompts, one JSON object per line: "prompt" with "image" or "images", "video" or "videos" (paths from
    the directory of the file, or addresses), or "messages"; "id", which is copied to the answer; "tools" and
    "enable_thinking" for the chat template; and options for the line such as "seed" or "max_new_tokens". The same
    command resumes an interrupted run."""

    out: Annotated[str | None, tyro.conf.arg(metavar="FILE", help_behavior_hint="(default: FILE.answers.jsonl)")] = None
    """The file of answers, one JSON object per line, in the order of completion."""

    slots: Annotated[Positive, tyro.conf.arg(metavar="N")] = SLOTS
    """Number of prompts that are answered at a time."""

    restart: bool = False
    """Overwrite the file of answers instead of resuming it."""

    def given(self) -> list[str]:
        """The options that need --jsonl, of those that were given."""
        is_given = {"--out": self.out is not None, "--slots": self.slots != SLOTS, "--restart": self.restart}
        return [option for option, given in is_given.items() if given]


@dataclasses.dataclass(kw_only=True)
class Generate(JsonOptions):
    """Answer a prompt about images and videos, or the many prompts of a file.

    The answer goes to standard output while it is generated, everything else to standard error. Compiled programs are
    kept in $JAX_COMPILATION_CACHE_DIR, or ~/.cache/glm4v_jax/xla; see `glm4v cache`.
    """

    # A tuple: several words are refused with a better message than a parser's.
    prompt: Annotated[
        tyro.conf.Positional[tuple[str, ...]], tyro.conf.arg(metavar="[PROMPT]", help_behavior_hint="")
    ] = ()
    """The question or instruction."""

    as_json: Annotated[bool, tyro.conf.arg(name="json")] = False
    """Print one JSON object with the answer, counts of tokens and times in seconds."""

    logprobs: Annotated[int | None, tyro.conf.arg(metavar="N")] = None
    """With --json or --jsonl: log probabilities of the chosen and of the N most likely tokens."""

    tools: Annotated[str | None, tyro.conf.arg(metavar="FILE|JSON")] = None
    """Functions that the model may call, for models whose chat template has tools: a JSON list in the shape of OpenAI's
    interface. With --json, the field "tool_calls" has the calls in the answer."""

    media: MediaOptions = dataclasses.field(default_factory=MediaOptions)
    sampling: SamplingOptions = dataclasses.field(default_factory=SamplingOptions)
    model: ModelOptions = dataclasses.field(default_factory=ModelOptions)
    batch: BatchOptions = dataclasses.field(default_factory=BatchOptions)
    distributed: DistributedOptions = dataclasses.field(default_factory=DistributedOptions)

    def run(self) -> None:
        """Check the options, prepare the inputs, and only then load the weights, generate and print."""
        self.model.check()
        if self.batch.jsonl is None:
            self._run_one(self._one_prompt())
        else:
            self._run_batch(self.batch.jsonl)

    def _one_prompt(self) -> str:
        """The prompt; GenerationError if there is not exactly one, or it is empty; or an option needs --jsonl."""
        if not self.prompt:
            raise GenerationError("PROMPT: found none; expected one, or --jsonl FILE")
        if len(self.prompt) > 1:
            quoted = shlex.quote(" ".join(self.prompt))
            raise GenerationError(f"PROMPT: found {len(self.prompt)}; expected one, in quotes: {quoted}")
        if not self.prompt[0].strip():
            raise GenerationError(f"PROMPT: found {self.prompt[0]!r}; expected some text")
        if found := self.batch.given():
            raise GenerationError(f"{', '.join(found)}: found without --jsonl; expected together with it")
        if self.logprobs is not None and not self.as_json:
            raise GenerationError("--logprobs: found without --json; expected together with it or --jsonl")
        return self.prompt[0]

    def _options(self) -> dict[str, Any]:
        options = self.sampling.given()
        return options if self.logprobs is None else {**options, "logprobs": self.logprobs}

    def _tools(self) -> list[Any]:
        """The functions of --tools; GenerationError if they are not a JSON list."""
        if self.tools is None:
            return []
        text = json_text("--tools", self.tools)
        try:
            found = json.loads(text)
        except (ValueError, RecursionError) as error:
            place = "" if text == self.tools else f" of {self.tools}"
            raise GenerationError(
                f"--tools{place}: found invalid JSON ({error}); expected a list of functions"
            ) from error
        from glm4v_jax.generate.prompt import split_options

        return split_options({"tools": found})[0].get("tools", [])

    def _run_batch(self, jsonl: str) -> None:
        given = {
            "PROMPT": bool(self.prompt),
            "--image": bool(self.media.image),
            "--video": bool(self.media.video),
            "--fps": self.media.fps is not None,
            "--tools": self.tools is not None,
        }
        if found := [option for option, is_given in given.items() if is_given]:
            raise GenerationError(f"{', '.join(found)}: found with --jsonl; expected in the file")
        from glm4v_jax.generate.offline.batch import PromptBatch
        from glm4v_jax.generate.offline.prompts import read_prompts
        from glm4v_jax.inputs.processor import Glm4vProcessor

        config = generation_config(self.model.directory, self.sampling.preset, self._options())
        processor = Glm4vProcessor.from_pretrained(self.model.directory)
        prompts = read_prompts(jsonl, config, processor, self.sampling.system)
        if missing := [prompt for prompt in prompts if prompt.missing is not None]:
            failing = f"{len(missing)} of {len(prompts)} prompts"
            print(
                f"{missing[0].place}: {missing[0].missing}; {failing} will fail for want of a file",
                file=sys.stderr,
                flush=True,
            )
        out = self.batch.out or f"{jsonl.removesuffix('.gz').removesuffix('.jsonl')}.answers.jsonl"
        batch = PromptBatch(prompts, out, config, self.model.sources, dtype=self.model.precision, sources=[jsonl])
        summary = run_batch(
            batch, processor, lambda: self.model.load(processor, self.batch.slots),
            restart=self.batch.restart, verbose=self.verbose,
        )  # fmt: skip
        if self.as_json:
            print(to_json(summary.fields()))
        summary.raise_if_failed()

    def _run_one(self, text: str) -> None:
        self.media.check()
        if self.media.fps is not None and not self.media.video:
            raise GenerationError("--fps: found without --video; expected together with it")
        from glm4v_jax.config.model import Glm4vConfig

        tools = self._tools()
        model_config = Glm4vConfig.from_pretrained(self.model.directory)
        options = self._options()
        config = generation_config(self.model.directory, self.sampling.preset, options)

        from glm4v_jax.generate.prompt import chat_variables, prompt_of
        from glm4v_jax.inputs.processor import Glm4vProcessor
        from glm4v_jax.inputs.text.messages import user_messages

        with silent_decoders() if not self.verbose else contextlib.nullcontext(), status("preparing the inputs"):
            processor = Glm4vProcessor.from_pretrained(self.model.directory)
            processor.check_ids(model_config)
            messages = user_messages(text, self.media.items(), self.sampling.system)
            variables = chat_variables({"tools": tools} if tools else {}, config, processor)
            prompt = prompt_of(messages, processor, model_config, **variables)
        limit = model_config.text_config.max_position_embeddings
        new_tokens = config.new_tokens(len(prompt), limit)

        from glm4v_jax.generate.sequence import SequenceState

        SequenceState(
            prompt, config, processor.tokenizer, limit, thinking=processor.thinking
        )  # raises where the budgets are too large
        engine = self.model.load(processor, tokens=len(prompt) + new_tokens)

        from glm4v_jax.devices.compilation_cache import compile_times
        from glm4v_jax.generate.completion import Counts, call_fields, completion_fields
        from glm4v_jax.generate.warmup import programs

        writer = None if self.as_json else AnswerWriter()
        completion = None
        with compile_times() as compiled:
            watch = Stopwatch(compiled)
            deltas = engine.stream(prompt, preset=self.sampling.preset, **options)
            for delta in after_status(deltas, programs(bool(prompt.media))):
                watch.note(delta)
                if writer is not None:
                    writer.show(delta)
                completion = delta.completion
        assert completion is not None
        times = watch.stop(len(completion.tokens))
        if writer is not None:
            writer.end(completion)
            print(figures(completion, Counts.of(completion, processor.tokenizer), times), file=sys.stderr)
            return
        fields = {
            **completion_fields(completion, processor.tokenizer),
            **({"tool_calls": call_fields(completion, tools)} if tools else {}),
            "seconds": round(times.seconds, 3),
            "compile_seconds": round(times.compiled, 3),
            "first_token_seconds": round(times.first, 3),
            "tokens_per_second": None if times.rate is None else round(times.rate, 2),
            "model": self.model.directory,
            **({} if self.model.adapter is None else {"adapter": self.model.adapter}),
        }
        print(to_json(fields))
