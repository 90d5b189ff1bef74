"""The state of one request: what its tokens mean, when it ends, and how it continues after a think budget.

The host's side of one row; knows nothing of devices.
"""

import hashlib
import time
from collections.abc import Sequence

import numpy as np

from glm4v_jax.config.generation import GenerationConfig
from glm4v_jax.config.thinking import THINKING, ThinkingFormat
from glm4v_jax.errors import GenerationError
from glm4v_jax.generate.completion import Completion, Delta, FinishReason
from glm4v_jax.generate.grammar import Guide
from glm4v_jax.generate.prefill_chunks import Start
from glm4v_jax.generate.text.repetition import RepetitionGuard
from glm4v_jax.generate.text.stream import StopStrings, TextStream
from glm4v_jax.generate.text.thinking import THINK, Part, ThinkingParser, format_after
from glm4v_jax.generate.token_logprobs import TokenLogprob, TokenLogprobs
from glm4v_jax.generate.token_masks import HELD, Turn
from glm4v_jax.inputs.prompt import Prompt
from glm4v_jax.inputs.text.tokenizer import Glm4vTokenizer


class SequenceState:
    """The state of one request: call `start`, then `take` with its tokens, until `finish_reason` is known."""

    def __init__(
        self,
        prompt: Prompt,
        config: GenerationConfig,
        tokenizer: Glm4vTokenizer,
        max_position_embeddings: int,
        *,
        thinking: ThinkingFormat = THINKING["tagged"],
        index: int = 0,
        number: int = 0,
        keep: int = 0,
    ):
        """Create the state of a request that has not started.

        `index` is that of the prompt among others, `number` that of the row in its request, for sampling; the row's
        cache holds `keep` tokens of the prompt. GenerationError if prompt and new tokens exceed
        `max_position_embeddings`, or a grammar is too large.
        """
        self.prompt, self.config, self.index = prompt, config, index
        self.tokens: list[int] = []
        self.finish_reason: FinishReason | None = None
        self._tokenizer, self._number, self._keep = tokenizer, number, keep
        self._logprobs: list[TokenLogprobs] = []
        thinking = self._thinking = format_after(thinking, prompt.input_ids, tokenizer)
        self._stream, self._parser = TextStream(tokenizer), ThinkingParser(thinking)
        self._stops, self._guard = StopStrings(config.stop_strings), RepetitionGuard()
        self._stop_string: str | None = None
        self._text: list[str] = []
        self._is_forced = self._is_closed = False
        self.is_cancelled = False
        self.reused_tokens = 0
        self._since = time.perf_counter()
        self._next: Start | None = None  # what this is restarted with, until its tokens come
        self._sampled = 0
        self.turn: Turn | None = None
        """what the row may do in the next dispatch, where a grammar says it"""
        self._guide: Guide | None = None
        if config.grammar is not None:
            self._guide = Guide(config.grammar, tokenizer, prompt.input_ids, config.eos_token_id)
        self._length = self._parsed = 0  # characters so far: decoded, and taken apart
        self._answer_begin: int | None = None
        self._answer_end: int | None = None
        budget, is_open = config.think_budget, thinking.begins_open
        self._close = tokenizer.encode(thinking.close) if budget is not None or self._guide is not None else []
        self._begin: list[int] = []
        """tokens that stand for a thought which is not to be, until the first are sampled"""
        if budget == 0 and is_open is not False:
            self._begin = self._close if is_open else tokenizer.encode(THINK + thinking.close)
            if self._guide is not None:
                self._guide.close_thought()
        self._first = config.new_tokens(len(prompt), max_position_embeddings)
        self._second = 0
        self._is_budgeted = bool(budget) and is_open is not False
        """whether a thought may still have to be closed"""
        if budget is not None:
            self._second = config.answer_budget or self._first
            self._first = budget
            if not self._is_budgeted:
                self._first, self._second = self._second, 0
            if (total := len(prompt) + self.max_total_tokens) > max_position_embeddings:
                raise GenerationError(
                    f"think_budget: found {budget:,}, with {self._second or self._first:,} for the answer and a prompt "
                    f"of {len(prompt):,} tokens; expected no more than max_position_embeddings="
                    f"{max_position_embeddings:,} in all, not {total:,}"
                )

    @property
    def max_total_tokens(self) -> int:
        """The most tokens that may follow the prompt."""
        return len(self._begin) + self._first + (len(self._close) + self._second if self._is_budgeted else 0)

    @property
    def may_continue(self) -> bool:
        """Whether the row may be restarted when it ends."""
        may_think = self._is_budgeted or (self._guide is not None and self._guide.is_thinking)
        return may_think and not self._is_forced

    @property
    def text(self) -> str:
        """The text so far."""
        return "".join(self._text)

    @property
    def in_cache(self) -> Prompt:
        """What the row's cache holds for certain: not the newest token, which has not been through the decoder."""
        whole = self.prompt.extended(self.tokens)
        return whole.truncated(len(whole) - 1 if self._next is None else self._next.keep)

    def digest(self) -> bytes:
        """16 bytes, equal for equal requests: tokens, media, options and numbers."""
        asked = (self.config, self.index, self._number, self._keep)
        digest = hashlib.blake2b(repr(asked).encode(), digest_size=16)
        digest.update(np.ascontiguousarray(self.prompt.input_ids, np.int32).data)
        for medium in self.prompt.media:
            digest.update(medium.key)
        return digest.digest()

    def start(self) -> Start:
        """Start the clock; returns what the row is started with."""
        self._since = time.perf_counter()
        prompt = self.prompt.extended(self._begin) if self._begin else self.prompt
        room = self.max_total_tokens - len(self._begin)
        return self._with_turn(Start(prompt, self.config, self._first, self._keep, self._number, room=room))

    def cancel(self) -> None:
        """End this with the next `take`, which drops its tokens; from any thread."""
        self.is_cancelled = True

    def queue(self) -> "_SingleQueue":
        """A queue of this request alone."""
        return _SingleQueue(self)

    def take(
        self, tokens: Sequence[int], done: bool, logprobs: TokenLogprobs | None = None
    ) -> tuple[Delta, Start | None]:
        """Take the next tokens of the row, with the last of which it may be `done`.

        Returns what is new, with the completion if this ends the sequence; and what the row is restarted with, if the
        row is done and the sequence is not. A sequence may end (`finish_reason`) while its row is not done.
        """
        if self.is_cancelled:
            self.finish_reason = "cancelled"
            return Delta("", (), (), self.completion()), None
        known = len(self._logprobs)
        begun, before = self._put_begin()
        begun_parts = self._parts(begun)
        # An end token that cuts a thought short is not part of the sequence, which continues without it.
        held = 1 if done and self.may_continue and tokens and tokens[-1] in self.config.eos_token_id else 0
        taken, text, stop = self._read(tokens[: len(tokens) - held], logprobs)
        parts = self._parts(text)
        start: Start | None = None
        more, others = "", list[int]()
        if self.may_continue and stop not in ("stop", "error") and (done or stop is not None):
            start, more, others = self._continue(stop, ended=bool(held))
            stop = "stop" if self._stop_string is not None else stop
        self._next = start
        if start is None and stop is None and held:
            others, more, stop = self._read(tokens[-1:], None if logprobs is None else logprobs[-1:])
        text, taken, parts = text + more, [*taken, *others], parts + self._parts(more)
        if start is None and (stop is not None or done):
            rest = self._flush() if self._stop_string is None else ""
            text += rest
            parts += self._parts(rest) + self._parser.finish()
            ended = self._stop_string is not None or (bool(self.tokens) and self.tokens[-1] in self.config.eos_token_id)
            if self._guide is not None and self._stop_string is None:
                ended = self._guide.is_complete
            self.finish_reason = stop or ("stop" if ended else "length")
        elif start is None and self._guide is not None:
            self.turn = self._guide.turn()
        text, parts, taken = begun + text, _joined(begun_parts, parts), [*before, *taken]
        self._text.append(text)
        completion = None if self.finish_reason is None else self.completion()
        return Delta(text, tuple(parts), tuple(taken), completion, self._told(known)), start

    def completion(self) -> Completion:
        """The completion so far; one without a finish reason counts as cancelled."""
        return Completion(
            self.index, self.text, tuple(self.tokens), len(self.prompt), self.finish_reason or "cancelled",
            self._stop_string, self._told() if self.config.logprobs is not None else None,
            self.prompt.image_sizes, error=None if self._guide is None else self._guide.error,
            answer_span=self._answer_span, thinking=self._thinking, reused_tokens=self.reused_tokens,
            is_forced=self._is_closed, seconds=time.perf_counter() - self._since,
        )  # fmt: skip

    def _told(self, known: int = 0) -> Sequence[TokenLogprob]:
        """The log probabilities of the tokens so far, without the first `known` parts of them."""
        return TokenLogprobs.joined(self._logprobs[known:]) if self._logprobs[known:] else ()

    @property
    def _answer_span(self) -> tuple[int, int] | None:
        if self._answer_begin is None:
            return None
        length = len(self.text)
        end = length if self._answer_end is None else min(self._answer_end, length)
        return min(self._answer_begin, length), end

    def _read(
        self, tokens: Sequence[int], logprobs: TokenLogprobs | None
    ) -> tuple[list[int], str, FinishReason | None]:
        """The tokens that count, their text, and the finish reason if the text gives one."""
        one_by_one = self.config.stop_strings or self.config.stop_repetition or self._guide is not None
        text, taken = "", list[int]()
        for part in ([token] for token in tokens) if one_by_one else [tokens]:
            taken += part
            if self._guide is not None:
                self._follow(self._guide, part[0])
            certain = self._decode(part)
            text += certain
            if self._stop_string is not None or (self.config.stop_repetition and self._guard.push(certain)):
                break
        self.tokens += taken
        self._sampled += len(taken)
        if logprobs is not None:
            self._logprobs.append(logprobs[: len(taken)])
        if self._stop_string is not None or (self._guide is not None and self._guide.is_complete):
            return taken, text, "stop"
        if self._guide is not None and self._guide.error is not None:
            return taken, text, "error"
        return taken, text, "repetition" if len(taken) < len(tokens) or self._guard.push("") else None

    def _follow(self, guide: Guide, token: int) -> None:
        """Take the next token of a sequence with a grammar, before its text."""
        was_answering = guide.is_answering
        guide.push(token)
        if guide.is_answering and not was_answering:
            self._answer_begin = self._length
        elif was_answering and token in self.config.eos_token_id and guide.is_complete:
            self._answer_end = self._length

    def _decode(self, tokens: Sequence[int]) -> str:
        """The text that has become certain with the next tokens; finds stop strings."""
        text = self._stream.push(tokens)
        self._length += len(text)
        certain, self._stop_string = self._stops.push(text)
        return certain

    def _parts(self, text: str) -> list[Part]:
        """Take the next text apart; what a grammar allows is an answer, whatever tags it seems to hold."""
        before, self._parsed = self._parsed, self._parsed + len(text)
        if self._answer_begin is None:
            return self._parser.push(text)
        begin = max(self._answer_begin - before, 0)
        end = len(text) if self._answer_end is None else max(self._answer_end - before, 0)
        parts = self._parser.push(text[:begin]) if text[:begin] else []
        parts += self._parser.push_answer(text[begin:end]) if text[begin:end] else []
        return parts + (self._parser.push(text[end:]) if text[end:] else [])

    def _with_turn(self, start: Start) -> Start:
        """What a row is started with; it is held until its first token is known."""
        if self._guide is None:
            return start
        self.turn = HELD
        return start._replace(turn=self._guide.turn())

    def _continue(self, stop: FinishReason | None, *, ended: bool) -> tuple[Start | None, str, list[int]]:
        """Close a thought whose budget is used up; or continue an answer that the think budget cut off."""
        self._is_forced = True
        is_open = self._parser.is_thought_open if self._guide is None else self._guide.is_thinking
        if not is_open and (ended or stop == "repetition"):
            return None, "", []
        sampled = self._sampled + ended
        # Without a budget what closes the thought is among the new tokens.
        limit = sampled + self._second if self._is_budgeted else self._first - len(self._close)
        if not self._is_budgeted and (not ended or sampled >= limit):
            return None, "", []
        forced = list(self._close) if is_open else []
        # All but the newest token are in the cache; that one is dropped if it is what ended the row.
        in_cache = len(self.prompt) + len(self.tokens) - (0 if ended else 1)
        text = ""
        if forced:
            self._is_closed = True
            text = self._decode(forced)
            if self._guide is not None:
                self._guide.close_thought()
            if self._stop_string is not None:
                return None, text, []
            self._guard = RepetitionGuard()  # repetition in the thought must not stop the answer
        self._add_forced(forced)
        start = Start(
            self.prompt.extended(self.tokens), self.config, limit, in_cache, self._number, step=sampled,
            room=self._second,
        )  # fmt: skip
        return self._with_turn(start), text, forced

    def _put_begin(self) -> tuple[str, list[int]]:
        """Add what stands for a thought that is not to be, before the first sampled token; no stop string is in it."""
        begin, self._begin = self._begin, []
        text = self._stream.push(begin)
        self._length += len(text)
        self._add_forced(begin)
        return text, begin

    def _add_forced(self, tokens: Sequence[int]) -> None:
        """Add tokens that were not sampled."""
        self.tokens += tokens
        if self.config.logprobs is not None:
            self._logprobs.append(TokenLogprobs.inserted(tokens))

    def _flush(self) -> str:
        """The rest of the text: broken characters, and the beginning of what did not become a stop string."""
        certain, self._stop_string = self._stops.push(self._stream.finish())
        return certain if self._stop_string is not None else certain + self._stops.finish()


def _joined(parts: list[Part], others: list[Part]) -> list[Part]:
    """Parts of two texts that follow each other, neighbours of a kind as one."""
    if parts and others and parts[-1].kind is others[0].kind:
        parts, others = [*parts[:-1], Part(parts[-1].kind, parts[-1].text + others[0].text)], others[1:]
    return parts + others


class _SingleQueue:
    """A queue of one request; see `scheduler.RequestQueue`."""

    def __init__(self, sequence: SequenceState):
        self._sequence: SequenceState | None = sequence

    @property
    def is_empty(self) -> bool:
        return self._sequence is None

    def fill(self) -> None:
        pass

    def ready(self) -> list[SequenceState]:
        return [] if self._sequence is None else [self._sequence]

    def take(self, *, wait: bool) -> SequenceState | None:
        del wait
        sequence, self._sequence = self._sequence, None
        return sequence
