"""The host's side of structured output: where an answer stands in its grammar, and what may come next.

A grammar (`GenerationConfig.grammar`) is that of the answer, which comes after the thought. `Guide` follows one
sequence, token by token:

- Its first token may be `<think>`, unless the prompt ends with a closed thought. The thought is free; it ends with
  `</think>`, or with the `<answer>` of an answer that did not wait for it. A prompt may end within the thought.
- Before the answer a line break and `<answer>` may come.
- From then on the grammar says which tokens may come: none with a special meaning, and end tokens only where the text
  is complete. An answer that no text can continue ends at once, without an end token.
"""

import dataclasses
import enum
import functools
import json
import threading
import weakref
from typing import TYPE_CHECKING, Any

import numpy as np
import tokenizers

from glm4v_jax.config.grammar import Grammar
from glm4v_jax.errors import GenerationError
from glm4v_jax.generate.text.thinking import ANSWER, END_THINK, THINK, thought_before
from glm4v_jax.generate.token_masks import Turn
from glm4v_jax.inputs.text.tokenizer import Glm4vTokenizer

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer


class _Phase(enum.Enum):
    OPEN = "nothing was written; a thought may begin"
    THOUGHT = "in the thought"
    BEFORE = "after the thought, or without one"
    TAGGED = "after the tag of the answer"
    ANSWER = "in the answer"
    ENDED = "the answer is complete"


@dataclasses.dataclass(frozen=True, eq=False)
class _Vocabulary:
    """A tokenizer as llguidance takes it, and the tokens around an answer; those that are no single token are None."""

    tokenizer: "LLTokenizer"
    added: np.ndarray
    """bits of the tokens that are no text"""
    think: int | None
    end_think: int | None
    answer: int | None
    line_break: int | None

    @classmethod
    def of(cls, tokenizer: Glm4vTokenizer) -> "_Vocabulary":
        backend = tokenizer.backend_tokenizer
        breaks = tokenizer.encode("\n", add_special_tokens=False)
        return cls(
            _text_tokenizer(backend),
            added=_with(np.zeros(-(-len(tokenizer) // 32), np.uint32), list(tokenizer.added_tokens_decoder)),
            think=backend.token_to_id(THINK),
            end_think=backend.token_to_id(END_THINK),
            answer=backend.token_to_id(ANSWER),
            line_break=breaks[0] if len(breaks) == 1 else None,
        )


def _text_tokenizer(backend: tokenizers.Tokenizer) -> "LLTokenizer":
    """A tokenizer whose only added token is an end token, written as no text is.

    What a grammar spells like a special token has to come as tokens of text.
    """
    from llguidance import LLTokenizer

    content = json.loads(backend.to_str())
    end: dict[str, Any] = {"id": len(content["model"]["vocab"]), "content": "<|\ue000|>", "special": True}
    end |= dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    content |= {"added_tokens": [end], "post_processor": None, "padding": None, "truncation": None}
    return LLTokenizer(json.dumps(content), eos_token=end["id"])


_lock = threading.Lock()
_vocabularies: weakref.WeakKeyDictionary[Glm4vTokenizer, _Vocabulary] = weakref.WeakKeyDictionary()


def _vocabulary_of(tokenizer: Glm4vTokenizer) -> _Vocabulary:
    """Kept for each tokenizer: that of GLM-4.1V takes seconds."""
    with _lock:
        if tokenizer not in _vocabularies:
            _vocabularies[tokenizer] = _Vocabulary.of(tokenizer)
        return _vocabularies[tokenizer]


@functools.lru_cache(maxsize=64)
def _beginning(vocabulary: _Vocabulary, grammar: Grammar) -> tuple["LLMatcher", np.ndarray]:
    """A matcher before the first token, to be copied, and the bits of the tokens that may come first.

    Raises:
      GenerationError: the grammar is too large, or allows no text but an empty one.
    """
    from llguidance import LLMatcher, LLParserLimits

    limits = LLParserLimits(verbose_errors=False)
    matcher = LLMatcher(vocabulary.tokenizer, grammar.text, log_level=0, limits=limits)
    bits = _bits(matcher, vocabulary)
    if matcher.is_error() and matcher.stop_reason() != "NoExtensionBias":
        raise GenerationError(_fault(grammar, matcher))
    if not bits.any():
        raise GenerationError(f"{grammar.kind}: found what no text fits but an empty one; expected some text")
    return matcher, bits


class Guide:
    """Follows one sequence, and says what may come next."""

    def __init__(
        self, grammar: Grammar, tokenizer: Glm4vTokenizer, prompt_ids: np.ndarray, eos_token_id: tuple[int, ...]
    ):
        """Start after a prompt; GenerationError if the grammar cannot be used with this tokenizer."""
        self._vocabulary, self._grammar = _vocabulary_of(tokenizer), grammar
        matcher, self._allowed = _beginning(self._vocabulary, grammar)
        with _lock:
            self._matcher = matcher.deep_copy()
        self._eos = eos_token_id
        self._pending: list[int] = []  # forced tokens that have not come yet; the matcher knows them
        self._phase = self._phase_after(prompt_ids, tokenizer)
        self._may_break = self._vocabulary.line_break is not None
        self.error: str | None = None

    @property
    def is_thinking(self) -> bool:
        """Whether the thought is open."""
        return self._phase is _Phase.THOUGHT

    @property
    def is_answering(self) -> bool:
        """Whether the text of the answer has begun, and its end is not known."""
        return self._phase is _Phase.ANSWER

    @property
    def is_complete(self) -> bool:
        """Whether the answer has ended."""
        return self._phase is _Phase.ENDED

    def close_thought(self) -> None:
        """Continue after a thought that was closed from outside, with the tag of an answer."""
        self._phase = _Phase.TAGGED
        self._look_ahead()

    def turn(self) -> Turn:
        """What may come in the next dispatch."""
        words = self._vocabulary
        if self.is_thinking:
            return Turn(pause=tuple(token for token in (words.end_think, words.answer) if token is not None))
        if self._phase in (_Phase.OPEN, _Phase.BEFORE):
            others = [words.answer, words.line_break if self._may_break else None]
            others += [words.think] if self._phase is _Phase.OPEN else []
            allowed = _with(self._mask(), [token for token in others if token is not None])
            return Turn.of(allowed, ())
        return Turn.of(None if self._is_at_end else self._mask(), tuple(self._pending))

    def push(self, token: int) -> None:
        """Take the next token of the sequence."""
        words = self._vocabulary
        match self._phase:
            case _Phase.THOUGHT:
                if token == words.end_think:
                    self._phase = _Phase.BEFORE
                elif token == words.answer:
                    self.close_thought()
            case _Phase.OPEN | _Phase.BEFORE if token == words.answer:
                self.close_thought()
            case _Phase.OPEN if token == words.think:
                self._phase = _Phase.THOUGHT
            case _Phase.OPEN | _Phase.BEFORE if token == words.line_break and not _has(self._allowed, token):
                self._may_break = False
            case _Phase.ENDED:
                pass
            case _:
                self._match(token)

    def _match(self, token: int) -> None:
        """Take a token of the answer, or its end."""
        if self._pending:
            self._phase = _Phase.ANSWER
            del self._pending[0]
        elif token in self._eos:
            self._phase = _Phase.ENDED
            return
        else:
            self._phase = _Phase.ANSWER
            self._matcher.consume_token(token)
            self._look_ahead()
        if self._is_at_end and not self._pending and self.error is None:
            self._phase = _Phase.ENDED

    @property
    def _is_at_end(self) -> bool:
        """Whether nothing can follow what the matcher knows."""
        return self._matcher.is_stopped() or not self._allowed.any()

    def _look_ahead(self) -> None:
        """Find the tokens that must come next, and those that may come after them."""
        matcher = self._matcher
        self._pending = matcher.compute_ff_tokens()
        matcher.consume_tokens(self._pending)
        self._allowed = _bits(matcher, self._vocabulary)
        if matcher.is_error():
            self.error = _fault(self._grammar, matcher)
        elif self._is_at_end and not matcher.is_accepting():
            self.error = f"{self._grammar.kind}: found a text that no token continues; expected another grammar"

    def _mask(self) -> np.ndarray:
        """The bits of the tokens that may come, end tokens too where the text may end."""
        if self._matcher.is_accepting():
            return _with(self._allowed, self._eos)
        return _without(self._allowed, self._eos)

    def _phase_after(self, prompt_ids: np.ndarray, tokenizer: Glm4vTokenizer) -> _Phase:
        """Where a prompt ends: some templates open a thought, or open and close it."""
        words = self._vocabulary
        if words.think is None or words.end_think is None:
            return _Phase.BEFORE
        is_open = thought_before(prompt_ids, tokenizer)
        if is_open is None:
            return _Phase.OPEN
        return _Phase.THOUGHT if is_open else _Phase.BEFORE


def _bits(matcher: "LLMatcher", vocabulary: _Vocabulary) -> np.ndarray:
    """uint32 [W]: the tokens of text that may come next."""
    found, bits = np.frombuffer(matcher.compute_bitmask(), np.uint32), np.zeros_like(vocabulary.added)
    count = min(len(found), len(bits))
    bits[:count] = found[:count]
    return bits & ~vocabulary.added


def _with(bits: np.ndarray, tokens: tuple[int, ...] | list[int]) -> np.ndarray:
    bits = bits.copy()
    for token in tokens:
        if token // 32 < len(bits):
            bits[token // 32] |= np.uint32(1 << token % 32)
    return bits


def _without(bits: np.ndarray, tokens: tuple[int, ...] | list[int]) -> np.ndarray:
    return bits & ~_with(np.zeros_like(bits), tokens)


def _has(bits: np.ndarray, token: int) -> bool:
    return bool(bits[token // 32] >> np.uint32(token % 32) & 1)


def _fault(grammar: Grammar, matcher: "LLMatcher") -> str:
    reason = " ".join(matcher.get_error().removesuffix("<non-verbose/>").split())[:200]
    return f"{grammar.kind}: found what cannot be followed ({reason}); expected a simpler one"
