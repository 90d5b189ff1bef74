"""Many prompts through the engine into a file, so that a run that ends early can go on: `--jsonl` and `describe`."""

import contextlib
import dataclasses
import functools
import hashlib
import json
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from glm4v_jax.console.distributed import OthersAnswers, answers_of_all
from glm4v_jax.console.progress import Progress
from glm4v_jax.errors import GenerationError
from glm4v_jax.files import is_same_file, model_fingerprint
from glm4v_jax.generate.completion import completion_fields
from glm4v_jax.generate.offline.answer_file import AnswerFile
from glm4v_jax.generate.offline.prompts import Row, asks_net
from glm4v_jax.inputs.media.quiet import quiet_ffmpeg, unsuspected_pictures

if TYPE_CHECKING:
    from glm4v_jax.config.generation import GenerationConfig
    from glm4v_jax.console.options import ModelOptions
    from glm4v_jax.generate.completion import Completion
    from glm4v_jax.inputs.processor import Glm4vProcessor

_NOTED = 20
"""So many failures are told at once; of more the file tells."""

_FOR_A_PERSON = ("may_pass", "things")
"""Fields of `Summary` that are no figures."""

Line = Callable[["Completion", "Glm4vProcessor"], dict[str, Any]]


@dataclasses.dataclass(frozen=True)
class Summary:
    """What a run has done.

    Attributes:
      out: where the answers are.
      total: prompts in all.
      earlier: of these, how many were answered before this run.
      done, failed: how many this run has answered, and how many could not be.
      prompt_tokens, new_tokens: of those it has answered.
      seconds: of the run, without loading the weights.
      compile_seconds: of these.
      slots_busy: mean number of slots that made tokens while any did.
      may_pass: whether what could not be answered asked for something in the net, which may answer the next time.
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

    def fields(self) -> dict[str, Any]:
        """The same as JSON has it."""
        seconds = max(self.seconds, 1e-9)
        figures = {name: value for name, value in dataclasses.asdict(self).items() if name not in _FOR_A_PERSON}
        return {
            **figures,
            "seconds": round(self.seconds, 3),
            "compile_seconds": round(self.compile_seconds, 3),
            "tokens_per_second": round(self.new_tokens / seconds, 2),
            "slots_busy": round(self.slots_busy, 2),
        }

    def __str__(self) -> str:
        earlier = f" ({self.earlier} of them by an earlier run)" if self.earlier else ""
        counts = f"{self.earlier + self.done} of {self.total} answered{earlier}, {self.failed} failed"
        if not self.done:
            return f"{counts}; answers in {self.out}"
        per_second = f"{self.done / self.seconds:.2f} {self.things}/s, {self.new_tokens / self.seconds:.1f} tokens/s"
        return (
            f"{counts}, in {self.seconds:.1f} s, {self.compile_seconds:.1f} s of them compiling: {per_second}, "
            f"{self.slots_busy:.2f} slots busy on average; answers in {self.out}"
        )

    def raise_if_failed(self) -> None:
        """Turns failures into an exit status.

        Raises:
          GenerationError: there were some.
        """
        if self.failed:
            # A file is as broken the next time, unless somebody mends it.
            again = "; the same command tries them again" if self.may_pass else ""
            raise GenerationError(
                f"{self.failed} of {self.total} {self.things} failed; see 'error' in {self.out}{again}"
            )


class Batch:
    """Prompts, and the file of their answers."""

    def __init__(
        self,
        rows: Sequence[Row],
        out: str,
        config: "GenerationConfig",
        options: "ModelOptions",
        num_slots: int,
        *,
        field: str = "index",
        line: Line | None = None,
        sources: Sequence[str] = (),
        keep_others: bool = False,
        things: str = "prompts",
    ):
        """Put a batch together.

        Args:
          rows: the prompts; their names are distinct.
          out: the file for the answers.
          config: for all of them.
          options: which model.
          num_slots: how many are answered at a time.
          field: what lines call a row's name.
          line: what to write of a completion; `completion_fields` by default.
          sources: files that `out` must not be.
          keep_others: see `AnswerFile`.
          things: what a person calls the rows.
        """
        self._rows, self._out, self._config, self._options, self._num_slots = rows, out, config, options, num_slots
        self._field, self._line, self._sources, self._keep_others = field, line or _line, sources, keep_others
        self._things = things
        self._seeds = {row.name: row_seed(row, config.seed) for row in rows}
        self._model = model_fingerprint(options.model)

    def run(self, processor: "Glm4vProcessor", *, restart: bool = False) -> Summary:
        """Answers what has not been answered, writing each answer as it is completed.

        On Ctrl-C says how to go on, and lets the interrupt pass.

        Raises:
          OSError, GenerationError: see `AnswerFile`; before the weights are loaded.
          Glm4vError: what is wrong with the weights. What is wrong with a prompt is in its line.
        """
        for source in self._sources:
            if is_same_file(self._out, source):
                raise GenerationError(f"--out {self._out}: is among what is asked about; expected another")
        keys = self._keys()
        with answers_of_all(self._options, functools.partial(self._open, keys, restart=restart), keys) as file:
            pending = [row for row in self._rows if row.name not in file.done]
            earlier = len(self._rows) - len(pending)
            if not pending:
                summary = Summary(self._out, len(self._rows), earlier, things=self._things)
            else:
                if earlier:
                    print(f"{self._out}: goes on behind {earlier} of {len(self._rows)} answers", file=sys.stderr)
                summary = self._answer(pending, file, processor)
        print(summary, file=sys.stderr, flush=True)
        return summary

    def check(self) -> None:
        """Look whether `run` can go on with the file that is there, if one is.

        Raises:
          OSError, GenerationError: see `AnswerFile`.
        """
        if os.path.exists(self._out):
            self._open(self._keys(), restart=False).close()

    def _keys(self) -> dict[int | str, str]:
        return {row.name: self._key(row) for row in self._rows}

    def _open(self, keys: Mapping[int | str, str], *, restart: bool) -> AnswerFile:
        return AnswerFile(self._out, self._field, keys, restart=restart, keep_others=self._keep_others)

    def _answer(self, pending: Sequence[Row], file: AnswerFile | OthersAnswers, processor: "Glm4vProcessor") -> Summary:
        engine = self._options.load(processor, self._num_slots)
        from glm4v_jax.devices.compilation_cache import compile_times
        from glm4v_jax.generate.engine import Request

        total, earlier = len(self._rows), len(self._rows) - len(pending)
        requests = (Request(row.messages, {**row.options, "seed": self._seeds[row.name]}) for row in pending)
        done = failed = prompt_tokens = new_tokens = 0
        may_pass = False
        before = dataclasses.replace(engine.stats)
        started = time.perf_counter()
        progress = Progress(total, earlier, self._things)
        quiet = contextlib.nullcontext() if self._options.debug else quiet_ffmpeg()
        shared = {field.name: getattr(self._config, field.name) for field in dataclasses.fields(self._config)}
        try:
            with quiet, unsuspected_pictures(), progress.shown(), compile_times() as compiled:
                for completion in engine.generate_many(requests, skip_errors=True, **shared):
                    row = pending[completion.index]
                    if completion.error is not None:
                        may_pass |= asks_net(row)
                        file.append(row.name, {**row.fields, "error": completion.error})
                        failed += 1
                        if failed <= _NOTED:
                            progress.note(f"{self._called(row)}: {' '.join(completion.error.split())}")
                    else:
                        prompt_tokens += completion.prompt_tokens
                        new_tokens += len(completion.tokens)
                        line = self._line(completion, processor)
                        file.append(row.name, {**row.fields, **line, "seed": self._seeds[row.name]})
                        done += 1  # not before: Ctrl-C may come in between
                    progress.add(len(completion.tokens))
        except KeyboardInterrupt:
            answers = _counted(earlier + done, "answer")
            errors = f" and {_counted(failed, 'error')}" if failed else ""
            print(
                f"interrupted: {answers}{errors} of {total} {self._things} are in {self._out}; the same command goes "
                "on behind them",
                file=sys.stderr,
            )
            raise
        seconds = time.perf_counter() - started
        steps = engine.stats.slot_steps - before.slot_steps
        busy = (engine.stats.busy_steps - before.busy_steps) / steps * self._num_slots if steps else 0.0
        return Summary(
            self._out, total, earlier, done, failed, prompt_tokens, new_tokens,
            seconds=seconds, compile_seconds=sum(compiled), slots_busy=busy, may_pass=may_pass,
            things=self._things,
        )  # fmt: skip

    def _called(self, row: Row) -> str:
        """How a person finds a row."""
        name = f"{self._field} {row.name}" if row.place is None else row.place
        return f"{name} (id {row.fields['id']!r})" if "id" in row.fields else name

    def _key(self, row: Row) -> str:
        """What is asked and how, in short: equal for equal answers. What is in pictures is not part of it."""
        asked = {
            "model": self._model,
            "dtype": self._options.dtype,
            "config": dataclasses.asdict(self._config.replace(**row.options)) | {"seed": self._seeds[row.name]},
            "asked": row.asked,
        }
        return _digest(asked).hex()


def row_seed(row: Row, seed: int) -> int:
    """The seed of a row's draws: its own, or one made from its name, so that a later run draws the same."""
    if row.options.get("seed") is not None:
        return row.options["seed"]
    return int.from_bytes(_digest({"seed": seed, "row": row.name})[:4], "little")


def _counted(number: int, thing: str) -> str:
    return f"{number} {thing}{'s' * (number != 1)}"


def _digest(value: Mapping[str, Any]) -> bytes:
    return hashlib.blake2b(json.dumps(value, sort_keys=True).encode(), digest_size=8).digest()


def _line(completion: "Completion", processor: "Glm4vProcessor") -> dict[str, Any]:
    return completion_fields(completion, processor.tokenizer)
