"""Completions -> bodies of responses, and events of streams, as OpenAI's and vLLM's clients read them.

A thought is sent as `reasoning` and, with the same text, as `reasoning_content`: servers disagree about the name.
"""

import dataclasses
import functools
import json
import math
import time
import uuid
from collections.abc import Iterable, Sequence
from typing import Any

from glm4v_jax.config.thinking import THINKING, ThinkingFormat
from glm4v_jax.generate.completion import Completion, Counts, Delta, box_fields
from glm4v_jax.generate.text.stream import TextStream
from glm4v_jax.generate.text.thinking import Kind, Part, ThinkingParser, format_after
from glm4v_jax.generate.text.tool_calls import ToolCall, ToolCallParser
from glm4v_jax.generate.token_logprobs import TokenLogprob
from glm4v_jax.inputs.prompt import Prompt
from glm4v_jax.inputs.text.tokenizer import Glm4vTokenizer
from glm4v_jax.serve.errors import ApiError
from glm4v_jax.serve.requests import ApiRequest

DONE = b"data: [DONE]\n\n"
_LOWEST = -9999.0
"""What OpenAI's interface has for a probability of zero."""


def event(content: Any) -> bytes:
    """One event of a stream.

    >>> event({"a": 1}).decode().splitlines()
    ['data: {"a":1}', '']
    """
    return b"data: " + to_bytes(content) + b"\n\n"


def to_bytes(content: Any) -> bytes:
    """A JSON body."""
    return json.dumps(content, ensure_ascii=False, separators=(",", ":"), allow_nan=False).encode("utf-8", "replace")


class _Trimmed:
    """Text without whitespace at its ends, piece by piece: what may be the end waits."""

    def __init__(self) -> None:
        self._held, self._has_begun = "", False

    def push(self, text: str) -> str:
        text = self._held + text
        if not self._has_begun:
            text = text.lstrip()
        shown = text.rstrip()
        self._has_begun = self._has_begun or bool(shown)
        self._held = text[len(shown) :] if self._has_begun else ""
        return shown


class _Message:
    """Thought, content and tool calls of an answer, piece by piece: without tags, but for those of boxes."""

    def __init__(self, request: ApiRequest, thinking: ThinkingFormat):
        """`thinking`: how the model writes thoughts, after the prompt."""
        self._parser = ThinkingParser(thinking, with_box_tags=True)
        self._is_plain = request.has_grammar
        self._tools = ToolCallParser(request.tools, is_single=request.has_single_call)
        self._thought, self._content = _Trimmed(), _Trimmed()

    def push(self, delta: Delta) -> tuple[str, list[str | ToolCall]]:
        """Take what is new; returns that of the thought, and texts and calls of the content."""
        is_last = delta.completion is not None
        parts: Sequence[Part] = delta.parts  # which a grammar's answer is read into without looking for tags
        if not self._is_plain:
            parts = self._parser.push(delta.text) + (self._parser.finish() if is_last else [])
        thought = self._thought.push("".join(part.text for part in parts if part.kind is Kind.THOUGHT))
        content = "".join(part.text for part in parts if part.kind is not Kind.THOUGHT)
        if self._is_plain:
            return thought, [content] if content else []
        pieces = self._tools.push(content) + (self._tools.finish() if is_last else [])
        shown = [self._content.push(piece) if isinstance(piece, str) else piece for piece in pieces]
        return thought, [piece for piece in shown if piece]

    def whole(self, completion: Completion) -> tuple[str | None, str, list[ToolCall]]:
        """Take a whole answer at once; returns its thought, None where there is none, its content and its calls."""
        if self._is_plain:
            return completion.thought, completion.answer, []
        self._parser.push(completion.text)
        self._parser.finish()
        pieces = self._tools.push(self._parser.answer_with_boxes()) + self._tools.finish()
        texts = [piece for piece in pieces if isinstance(piece, str)]
        return self._parser.parsed().thought, "".join(texts).strip(), [x for x in pieces if isinstance(x, ToolCall)]


@dataclasses.dataclass
class Reply:
    """What the responses to one request share.

    Attributes:
      request: what was asked.
      prompts: the prepared prompts.
      model: its name.
      tokenizer, thinking: of the model.
      id, created: of the response.
    """

    request: ApiRequest
    prompts: Sequence[Prompt]
    model: str
    tokenizer: Glm4vTokenizer
    thinking: ThinkingFormat = THINKING["tagged"]
    id: str = ""
    created: int = dataclasses.field(default_factory=lambda: int(time.time()))

    def __post_init__(self) -> None:
        self.id = self.id or f"{'chatcmpl' if self.request.is_chat else 'cmpl'}-{uuid.uuid4().hex}"

    def body(self, completions: Sequence[Completion]) -> dict[str, Any]:
        """The body of the response, from the completions in their order."""
        choice = self._chat_choice if self.request.is_chat else self._text_choice
        choices = [choice(number, completion) for number, completion in enumerate(completions)]
        name = "chat.completion" if self.request.is_chat else "text_completion"
        return self._envelope(name, choices) | {"usage": self.usage(completions)} | self._warnings()

    def chunk(self, choices: list[dict[str, Any]], **more: Any) -> dict[str, Any]:
        """One event of the stream."""
        name = "chat.completion.chunk" if self.request.is_chat else "text_completion"
        usage = {"usage": None} if self.request.with_usage else {}
        return self._envelope(name, choices) | usage | more

    def first_chunks(self) -> list[dict[str, Any]]:
        """What a stream begins with, if anything but tokens."""
        first = {"delta": {"role": "assistant", "content": ""}} if self.request.is_chat else {"text": ""}
        if not self.request.is_chat and not self.request.warnings:
            return []
        count = len(self.prompts) * self.request.n if self.request.is_chat else 1
        chunks = [self.chunk([_chunk_choice(number, first)]) for number in range(count)]
        return [chunks[0] | self._warnings(), *chunks[1:]]

    def last_chunks(self, completions: Sequence[Completion]) -> list[dict[str, Any]]:
        """What a stream ends with: token counts, where they were asked for."""
        return [self.chunk([], usage=self.usage(completions))] if self.request.with_usage else []

    def choice_stream(self, number: int) -> "ChoiceStream":
        """What makes events of the deltas of choice `number`."""
        return ChoiceStream(self, number)

    def usage(self, completions: Sequence[Completion]) -> dict[str, Any]:
        """Token counts. A prompt counts once, however many choices it has."""
        prompt = sum(map(len, self.prompts))
        new = sum(len(completion.tokens) for completion in completions)
        reasoning = sum(Counts.of(one, self.tokenizer).thought for one in completions)
        cached = sum(one.reused_tokens for one in completions[:: self.request.n])
        vision = sum(int((prompt.medium_of >= 0).sum()) for prompt in self.prompts)
        return {
            "prompt_tokens": prompt,
            "completion_tokens": new,
            "total_tokens": prompt + new,
            "prompt_tokens_details": {"cached_tokens": cached, "image_tokens": vision},
            "completion_tokens_details": {"reasoning_tokens": reasoning},
        }

    def message(self, number: int) -> _Message:
        """An empty message for choice `number`."""
        prompt = self.prompts[number // self.request.n]
        return _Message(self.request, format_after(self.thinking, prompt.input_ids, self.tokenizer))

    def logprobs(self, entries: Iterable[TokenLogprob], offset: int = 0) -> dict[str, Any] | None:
        """Log probabilities of tokens; None where they were not asked for.

        A token that the engine put in, to close a thought, has 0: it could be no other.

        Args:
          entries: one a token.
          offset: characters of the text before them.
        """
        if self.request.options.get("logprobs") is None:
            return None
        return self._chat_logprobs(entries) if self.request.is_chat else self._text_logprobs(entries, offset)

    def finish(self, completion: Completion, *, has_calls: bool = False) -> dict[str, Any]:
        """Why a choice ended; repetition, stop strings and tokens count as "stop", and `stop_reason` has more."""
        found: str = completion.finish_reason
        more: str | int | None = completion.stop_string if found == "stop" else None
        if found == "repetition":
            more = found
        elif found == "stop" and more is None:
            more = next((int(last) for last in completion.tokens[-1:] if last in self.request.stop_tokens), None)
        if found in ("stop", "repetition"):
            found = "tool_calls" if has_calls else "stop"
        return {"finish_reason": found, "stop_reason": more}

    def _envelope(self, name: str, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return {"id": self.id, "object": name, "created": self.created, "model": self.model, "choices": choices}

    def _warnings(self) -> dict[str, Any]:
        return {"warnings": list(self.request.warnings)} if self.request.warnings else {}

    def _chat_choice(self, number: int, completion: Completion) -> dict[str, Any]:
        thought, content, calls = self.message(number).whole(completion)
        thought = thought if self.request.with_reasoning else None
        message: dict[str, Any] = {
            "role": "assistant",
            "content": content or (None if calls else ""),
            "reasoning": thought,
            "reasoning_content": thought,
        }
        if calls:
            message["tool_calls"] = [call.body() for call in calls]
        message |= _boxes(completion)
        logprobs = self.logprobs(completion.logprobs or ())
        finish = self.finish(completion, has_calls=bool(calls))
        return {"index": number, "message": message, "logprobs": logprobs, **finish}

    def _text_choice(self, number: int, completion: Completion) -> dict[str, Any]:
        logprobs = self.logprobs(completion.logprobs or ())
        return {"index": number, "text": completion.text, "logprobs": logprobs, **self.finish(completion)}

    def _chat_logprobs(self, entries: Iterable[TokenLogprob]) -> dict[str, Any]:
        def one(token: int, value: float | None) -> dict[str, Any]:
            raw = self._bytes(token)
            return {"token": raw.decode("utf-8", "replace"), "logprob": _finite(value), "bytes": list(raw)}

        return {
            "content": [
                {**one(entry.token, entry.logprob), "top_logprobs": [one(*other) for other in entry.top]}
                for entry in entries
            ]
        }

    def _text_logprobs(self, entries: Iterable[TokenLogprob], offset: int) -> dict[str, Any]:
        found: dict[str, Any] = {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
        for entry in entries:
            token = self._token(entry.token)
            found["tokens"].append(token)
            found["token_logprobs"].append(_finite(entry.logprob))
            found["top_logprobs"].append({self._token(other): _finite(value) for other, value in entry.top})
            found["text_offset"].append(offset)
            offset += len(token)
        return found

    def _token(self, token: int) -> str:
        return self._bytes(token).decode("utf-8", "replace")

    def _bytes(self, token: int) -> bytes:
        return self._stream.bytes_of(token)

    @functools.cached_property
    def _stream(self) -> TextStream:
        return TextStream(self.tokenizer, with_special=True)


class ChoiceStream:
    """One choice of a stream: deltas of its sequence in, choices of events out.

    All events together say the same as the choice in the body of a response.
    """

    def __init__(self, reply: Reply, number: int):
        """See `Reply.choice_stream`."""
        self._reply, self._number = reply, number
        self._message = reply.message(number)
        self._offset = self._calls = 0

    def push(self, delta: Delta) -> list[dict[str, Any]]:
        """The next choices."""
        fields = self._chat(delta) if self._reply.request.is_chat else self._text(delta)
        choices = [_chunk_choice(self._number, one) for one in fields]
        if choices:
            choices[-1]["logprobs"] = self._reply.logprobs(delta.logprobs, self._offset)
        self._offset += len(delta.text)
        if delta.completion is not None:
            is_chat = self._reply.request.is_chat
            rest: dict[str, Any] = {"delta": _boxes(delta.completion)} if is_chat else {"text": ""}
            finish = self._reply.finish(delta.completion, has_calls=bool(self._calls))
            choices.append(_chunk_choice(self._number, rest) | finish)
        return choices

    def _text(self, delta: Delta) -> list[dict[str, Any]]:
        return [{"text": delta.text}] if delta.text or delta.logprobs else []

    def _chat(self, delta: Delta) -> list[dict[str, Any]]:
        thought, content = self._message.push(delta)
        found: list[dict[str, Any]] = []
        if thought and self._reply.request.with_reasoning:
            found.append({"delta": {"reasoning": thought, "reasoning_content": thought}})
        for piece in content:
            if isinstance(piece, str):
                found.append({"delta": {"content": piece}})
            else:
                found += [{"delta": {"tool_calls": [call]}} for call in piece.deltas(self._calls)]
                self._calls += 1
        return found or ([{"delta": {"content": ""}}] if delta.logprobs else [])


def error_event(error: ApiError) -> bytes:
    """The event of a stream that fails after it has begun."""
    return event(error.body())


def _boxes(completion: Completion) -> dict[str, Any]:
    """The boxes that an answer names, which stay in its content too; nothing where there are none."""
    fields = box_fields(completion)
    return fields if fields["boxes"] else {}


def _chunk_choice(number: int, fields: dict[str, Any]) -> dict[str, Any]:
    return {"index": number, **fields, "logprobs": None, "finish_reason": None}


def _finite(value: float | None) -> float:
    if value is None:
        return 0.0
    return value if math.isfinite(value) else _LOWEST
