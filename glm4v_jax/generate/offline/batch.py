"""Many prompts through the engine into a file that a later run can resume: `--jsonl`, `describe` and `eval`."""

import dataclasses
import functools
import hashlib
import json
import os
import time
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

from glm4v_jax.errors import GenerationError, counted
from glm4v_jax.files import fingerprint, is_same_file, model_fingerprint
from glm4v_jax.generate.completion import call_fields, completion_fields
from glm4v_jax.generate.offline.answer_file import AnswerFile, open_answers
from glm4v_jax.generate.offline.prompts import BatchPrompt, asks_network
from glm4v_jax.generate.prompt import split_options

if TYPE_CHECKING:
    from glm4v_jax.config.generation import GenerationConfig
    from glm4v_jax.generate.completion import Completion
    from glm4v_jax.generate.engine import Engine
    from glm4v_jax.inputs.processor import Glm4vProcessor

_LOGGED_FAILURES = 20
"""More than these are only in the file."""

_NOT_IN_JSON = ("may_pass", "things")
"""Fields of `BatchSummary` that are not figures."""

AnswerFields = Callable[["Completion", "Glm4vProcessor"], dict[str, Any]]


class BatchProgress(Protocol):
    """Shows a person how far a batch is; `glm4v_jax.console.progress.Progress` does."""

    def update(self, done: int, total: int, tokens: int = 0, compiled: float = 0.0) -> None:
        """Another prompt is done, for which `tokens` were generated; so far, `compiled` seconds went into compiling."""

    def log(self, line: str) -> None:
        """Print a line."""


@dataclasses.dataclass(frozen=True)
class BatchSummary:
    """What a run has done.

    Attributes:
      out: the file of answers.
      total: number of prompts.
      earlier: how many of them an earlier run has answered.
      done, failed: how many this run has answered, and could not answer.
      prompt_tokens, new_tokens: of those it has answered.
      seconds: of the run, without loading the weights.
      compile_seconds: of these; rates are without them.
      slots_busy: mean number of busy slots.
      may_pass: whether a failed prompt needs the network, so that it may pass the next time.
      things: what a person calls the prompts.
    """

    out: str
    total: int
    earlier: int
    done: int = 0
    failed: int = 0
    prompt_tokens: int = 0
    new_tokens: int = 0
    seconds: float = 0.0
    compile_seconds: float = 0.0
    slots_busy: float = 0.0
    may_pass: bool = False
    things: str = "prompts"

    @property
    def _running_seconds(self) -> float:
        return max(self.seconds - self.compile_seconds, 1e-9)

    def fields(self) -> dict[str, Any]:
        """The figures as JSON has them."""
        figures = {name: value for name, value in dataclasses.asdict(self).items() if name not in _NOT_IN_JSON}
        return {
            **figures,
            "seconds": round(self.seconds, 3),
            "compile_seconds": round(self.compile_seconds, 3),
            "tokens_per_second": round(self.new_tokens / self._running_seconds, 2),
            "slots_busy": round(self.slots_busy, 2),
        }

    def __str__(self) -> str:
        earlier = f" ({self.earlier} of them by an earlier run)" if self.earlier else ""
        counts = f"{self.earlier + self.done} of {self.total} {self.things} answered{earlier}, {self.failed} failed"
        if not self.done:
            return f"{counts}; answers in {self.out}"
        seconds = self._running_seconds
        per_second = f"{self.done / seconds:.2f} {self.things}/s, {self.new_tokens / seconds:.1f} tokens/s"
        return (
            f"{counts}, in {self.seconds:.1f} s ({self.compile_seconds:.1f} s compiling): {per_second}, "
            f"{self.slots_busy:.2f} slots busy on average; answers in {self.out}"
        )

    def raise_if_failed(self) -> None:
        """Turn failures into an exit status; GenerationError if there are some."""
        if self.failed:
            # A file is as broken the next time, unless somebody mends it.
            again = "; the same command tries them again" if self.may_pass else ""
            raise GenerationError(
                f"{self.failed} of {self.total} {self.things} failed; see 'error' in {self.out}{again}"
            )


class PromptBatch:
    """Prompts, and the file of their answers."""

    def __init__(
        self,
        prompts: Sequence[BatchPrompt],
        out: str,
        config: "GenerationConfig",
        directories: Sequence[str],
        *,
        dtype: str | None = None,
        name_field: str = "index",
        answer_fields: AnswerFields | None = None,
        sources: Sequence[str] = (),
        keep_others: bool = False,
        things: str = "prompts",
    ):
        """Put a batch together, of prompts with distinct names.

        Args:
          directories: that of the checkpoint, and that of its adapter if it has one; answers of others are not resumed.
          dtype: the options for the numbers of the weights; the same holds for them.
          name_field: the field of a line for its prompt's name.
          answer_fields: what to write of a completion; `completion_fields` by default.
          sources: files that `out` must not be.
          keep_others: see `AnswerFile`.
          things: what a person calls the prompts.
        """
        self.things = things
        self._prompts, self._out, self._config, self._dtype = prompts, out, config, dtype
        self._name_field, self._answer_fields = name_field, answer_fields or _all_fields
        self._sources, self._keep_others = sources, keep_others
        self._seeds = {prompt.name: prompt_seed(prompt, config.seed) for prompt in prompts}
        directory, *adapter = directories
        self._model = "+".join([model_fingerprint(directory), *map(fingerprint, adapter)])

    def run(
        self,
        processor: "Glm4vProcessor",
        load: Callable[[], "Engine"],
        progress: BatchProgress,
        *,
        restart: bool = False,
    ) -> BatchSummary:
        """Answer what has not been answered; write each answer when it is complete.

        The engine is loaded if there is something to answer; `restart` empties the file instead of resuming.

        Raises:
          OSError, GenerationError: see `AnswerFile`; before the weights are loaded.
          Glm4vError: what is wrong with the weights. What is wrong with a prompt is in its line.
          KeyboardInterrupt: after Ctrl-C, with how to resume.
        """
        for source in self._sources:
            if is_same_file(self._out, source):
                raise GenerationError(f"--out: found {self._out}, a file that is read; expected another")
        keys = self._keys()
        with open_answers(functools.partial(self._open, keys, restart=restart), keys) as file:
            pending = [prompt for prompt in self._prompts if prompt.name not in file.done]
            total = len(self._prompts)
            earlier = total - len(pending)
            if not pending:
                return BatchSummary(self._out, total, earlier, things=self.things)
            if earlier:
                progress.log(f"{self._out}: resuming after {earlier} of {counted(total, 'answer')}")
            return self._answer(pending, file, processor, load(), progress)

    def check(self) -> None:
        """Check that `run` can resume the file that is there, if one is.

        Raises:
          OSError, GenerationError: see `AnswerFile`.
        """
        if os.path.exists(self._out):
            self._open(self._keys(), restart=False).close()

    def _keys(self) -> dict[int | str, str]:
        return {prompt.name: self._key(prompt) for prompt in self._prompts}

    def _open(self, keys: Mapping[int | str, str], *, restart: bool) -> AnswerFile:
        return AnswerFile(self._out, self._name_field, keys, restart=restart, keep_others=self._keep_others)

    def _answer(
        self,
        pending: Sequence[BatchPrompt],
        file: AnswerFile,
        processor: "Glm4vProcessor",
        engine: "Engine",
        progress: BatchProgress,
    ) -> BatchSummary:
        from glm4v_jax.devices.compilation_cache import compile_times
        from glm4v_jax.generate.engine import Request

        total, earlier = len(self._prompts), len(self._prompts) - len(pending)
        requests = (
            Request(prompt.messages, {**prompt.options, "seed": self._seeds[prompt.name]}) for prompt in pending
        )
        done = failed = prompt_tokens = new_tokens = 0
        may_pass = False
        before = dataclasses.replace(engine.stats)
        started = time.perf_counter()
        shared = {field.name: getattr(self._config, field.name) for field in dataclasses.fields(self._config)}
        progress.update(earlier, total)
        try:
            with compile_times() as compiled:
                for completion in engine.generate_many(requests, skip_errors=True, **shared):
                    prompt = pending[completion.index]
                    if completion.error is not None:
                        may_pass |= asks_network(prompt)
                        file.append(prompt.name, {**prompt.fields, "error": completion.error})
                        failed += 1
                        if failed <= _LOGGED_FAILURES:
                            progress.log(f"{self._label(prompt)}: {' '.join(completion.error.split())}")
                    else:
                        prompt_tokens += completion.prompt_tokens
                        new_tokens += len(completion.tokens)
                        line = self._answer_fields(completion, processor)
                        if tools := prompt.options.get("tools"):
                            line["tool_calls"] = call_fields(completion, tools)
                        file.append(prompt.name, {**prompt.fields, **line, "seed": self._seeds[prompt.name]})
                        done += 1
                    progress.update(earlier + done + failed, total, len(completion.tokens), sum(compiled))
        except KeyboardInterrupt as error:
            done, failed = file.written()
            answers = counted(earlier + done, "answer")
            errors = f" and {counted(failed, 'error')}" if failed else ""
            raise KeyboardInterrupt(
                f"interrupted: {answers}{errors} of {total} {self.things} are in {self._out}; the same command resumes"
            ) from error
        seconds = time.perf_counter() - started
        steps = engine.stats.slot_steps - before.slot_steps
        busy = (engine.stats.busy_steps - before.busy_steps) / steps * engine.num_slots if steps else 0.0
        return BatchSummary(
            self._out, total, earlier, done, failed, prompt_tokens, new_tokens,
            seconds=seconds, compile_seconds=sum(compiled), slots_busy=busy, may_pass=may_pass, things=self.things,
        )  # fmt: skip

    def _label(self, prompt: BatchPrompt) -> str:
        """How a person finds a prompt."""
        name = f"{self._name_field} {prompt.name}" if prompt.place is None else prompt.place
        return f"{name} (id {prompt.fields['id']!r})" if "id" in prompt.fields else name

    def _key(self, prompt: BatchPrompt) -> str:
        """A digest of what is asked and how: equal for equal answers. The content of images is not part of it."""
        asked = {
            "model": self._model,
            "dtype": self._dtype,
            # Of the options those that are set: a file of answers outlives new ones.
            "config": self._config.replace(**split_options(prompt.options)[1]).changed()
            | {"seed": self._seeds[prompt.name]},
            "asked": prompt.asked,
        }
        return _digest(asked).hex()


def prompt_seed(prompt: BatchPrompt, seed: int) -> int:
    """The seed for a prompt: its own, or one made from its name, so that a later run samples the same."""
    if prompt.options.get("seed") is not None:
        return prompt.options["seed"]
    return int.from_bytes(_digest({"seed": seed, "row": prompt.name})[:4], "little")


def _digest(value: Mapping[str, Any]) -> bytes:
    return hashlib.blake2b(json.dumps(value, sort_keys=True).encode(), digest_size=8).digest()


def _all_fields(completion: "Completion", processor: "Glm4vProcessor") -> dict[str, Any]:
    return completion_fields(completion, processor.tokenizer)
