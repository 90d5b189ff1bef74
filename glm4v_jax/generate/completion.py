"""Results of generation: deltas while a sequence is generated, and its completion at the end."""

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np

from glm4v_jax.config.thinking import THINKING, ThinkingFormat
from glm4v_jax.errors import GenerationError
from glm4v_jax.generate.text.actions import Action, find_action
from glm4v_jax.generate.text.boxes import find_boxes, to_pixels
from glm4v_jax.generate.text.thinking import END_ANSWER, END_THINK, Parsed, Part, parse
from glm4v_jax.generate.text.tool_calls import ToolCall, split_calls
from glm4v_jax.generate.token_logprobs import TokenLogprob, TokenLogprobs
from glm4v_jax.inputs.text.tokenizer import Glm4vTokenizer

FinishReason = Literal["stop", "length", "repetition", "cancelled", "error"]


@dataclasses.dataclass(frozen=True)
class Completion:
    """What the model generated from a prompt.

    >>> text = "<think>2 and 2</think><answer>4 at <|begin_of_box|>[[0,0,500,500]]<|end_of_box|></answer>"
    >>> completion = Completion(0, text, (), 12, "stop", image_sizes=((640, 480),))
    >>> completion.thought, completion.boxes, completion.pixel_boxes()
    ('2 and 2', [(0.0, 0.0, 500.0, 500.0)], [(0, 0, 320, 240)])

    Attributes:
      index: number of the prompt among those given.
      text: as the model wrote it, with the tags of thought, answer and boxes, without other special tokens; ends before
        a stop string.
      tokens: new tokens, including the end token.
      prompt_tokens: tokens of the prompt, including those of images and videos.
      finish_reason: "stop" for an end token or stop string, "length" for the limit of tokens, "repetition" for
        repetitive text, "cancelled" for a stream that was closed, "error" for a prompt that could not be prepared.
      stop_string: the one that ended it.
      logprobs: one per token, where requested; a `TokenLogprobs`, so that they are also there as arrays.
      image_sizes: (width, height) of the prompt's images as given, in pixels.
      error: why the prompt could not be prepared, where errors are not raised; or why its grammar cannot be followed.
      answer_span: where the answer begins and ends in `text`, of a request with a grammar: read as it is, without tags.
      thinking: how the model writes thoughts, after this prompt.
      is_forced: whether the thought was closed because its budget was used up.
      reused_tokens: tokens of the prompt whose keys and values were those of another request's.
      seconds: from the start of the request until its end, while other requests ran.
    """

    index: int
    text: str
    tokens: tuple[int, ...]
    prompt_tokens: int
    finish_reason: FinishReason
    stop_string: str | None = None
    logprobs: Sequence[TokenLogprob] | None = None
    image_sizes: tuple[tuple[int, int], ...] = ()
    error: str | None = None
    answer_span: tuple[int, int] | None = None
    thinking: ThinkingFormat = THINKING["tagged"]
    is_forced: bool = False
    reused_tokens: int = dataclasses.field(default=0, compare=False)
    seconds: float = dataclasses.field(default=0.0, compare=False)

    @property
    def parsed(self) -> Parsed:
        """Thought, answer and boxed answer of the text."""
        if self.answer_span is None:
            return parse(self.text, self.thinking)
        begin, end = self.answer_span
        is_closed = self.text[end:].startswith(END_ANSWER)
        before = parse(self.text[:begin], self.thinking)
        return dataclasses.replace(before, answer=self.text[begin:end], is_answer_closed=is_closed)

    @property
    def answer(self) -> str:
        """The answer without thought and tags; of a request with a grammar exactly the text that the grammar allows."""
        return self.parsed.answer

    @property
    def thought(self) -> str | None:
        """The thought; None where the model did not think."""
        return self.parsed.thought

    @property
    def logprob_array(self) -> np.ndarray:
        """float32 [tokens]: the log probabilities of the tokens, NaN where they were not sampled.

        Raises:
          GenerationError: they were not requested.
        """
        return self._token_logprobs.values

    @property
    def is_sampled(self) -> np.ndarray:
        """bool [tokens]: False for tokens that the engine inserted; see `logprob_array`."""
        return self._token_logprobs.is_sampled

    @property
    def _token_logprobs(self) -> TokenLogprobs:
        if self.logprobs is None:
            raise GenerationError("logprobs: found none in a completion; expected logprobs=0 or more when generating")
        return self.logprobs if isinstance(self.logprobs, TokenLogprobs) else TokenLogprobs.of(self.logprobs)

    @property
    def action(self) -> Action | None:
        """The action of an agent that the text names; see `text.actions`."""
        return find_action(self.text, thinking=self.thinking)

    def tool_calls(self, tools: Sequence[Mapping[str, Any]]) -> list[ToolCall]:
        """The calls of `tools`, those that the prompt has named, in the answer; see `text.tool_calls`."""
        return [] if self.answer_span is not None else split_calls(self.answer, tools)[1]

    @property
    def boxes(self) -> list[tuple[float, float, float, float]]:
        """Boxes (x1, y1, x2, y2) that the answer names, 0 to 1000 of width and height."""
        return find_boxes(self.text, thinking=self.thinking)

    def pixel_boxes(self, image: int = 0) -> list[tuple[int, ...]]:
        """`boxes` in pixels of the prompt's image number `image`, at its original size.

        Raises:
          IndexError: there is no such image.
        """
        return to_pixels(self.boxes, *self.image_sizes[image])


class Delta(NamedTuple):
    """What a sequence has grown by.

    Attributes:
      text: what is new of `Completion.text`.
      parts: the same by kind, without tags.
      tokens: new tokens.
      completion: with the last delta.
      logprobs: one per new token, where requested.
    """

    text: str
    parts: tuple[Part, ...]
    tokens: tuple[int, ...]
    completion: Completion | None = None
    logprobs: Sequence[TokenLogprob] = ()


def last(deltas: Iterable[Delta]) -> Completion:
    """The completion at the end of a stream; GenerationError if the stream was closed before its end."""
    completion = None
    for delta in deltas:
        completion = delta.completion
    if completion is None:
        raise GenerationError("stream: found no completion; expected a stream that was not closed")
    return completion


@dataclasses.dataclass(frozen=True)
class Counts:
    """Token counts of a completion.

    Attributes:
      thought: up to the end of the thought, `</think>` included.
      answer: after it.
    """

    thought: int
    answer: int

    @classmethod
    def of(cls, completion: "Completion", tokenizer: "Glm4vTokenizer") -> "Counts":
        """Counts the tokens of a completion."""
        total = len(completion.tokens)
        if completion.thought is None:
            return cls(0, total)
        end = tokenizer.convert_tokens_to_ids(END_THINK)
        closed = [place for place, token in enumerate(completion.tokens, 1) if token == end]
        thought = closed[-1] if closed and completion.parsed.is_thought_closed else total
        return cls(thought, total - thought)

    def __str__(self) -> str:
        return f"{self.thought} of thought and {self.answer} of answer" if self.thought else ""


def box_fields(completion: "Completion") -> dict[str, Any]:
    """The boxes of a completion as fields of a JSON object.

    >>> text = "At <|begin_of_box|>[[0,0,500,500]]<|end_of_box|>"
    >>> box_fields(Completion(0, text, (), 12, "stop", image_sizes=((640, 480),)))
    {'boxes': [[0.0, 0.0, 500.0, 500.0]], 'pixel_boxes': [[0, 0, 320, 240]]}

    `boxes` (0 to 1000) come with `pixel_boxes` where the prompt had exactly one image: a text does not say reliably
    which of several images it speaks of.
    """
    fields: dict[str, Any] = {"boxes": [list(box) for box in completion.boxes]}
    if len(completion.image_sizes) == 1:
        fields["pixel_boxes"] = [list(box) for box in completion.pixel_boxes()]
    return fields


def call_fields(completion: "Completion", tools: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The calls of `tools` in a completion as a JSON list: their names and arguments."""
    return [{"name": call.name, "arguments": dict(call.arguments)} for call in completion.tool_calls(tools)]


def completion_fields(completion: "Completion", tokenizer: "Glm4vTokenizer") -> dict[str, Any]:
    """A completion as a JSON object; see `box_fields` for the boxes."""
    parsed = completion.parsed
    counts = Counts.of(completion, tokenizer)
    fields: dict[str, Any] = {
        "text": completion.text,
        "thought": parsed.thought,
        "answer": parsed.answer,
        "boxed": list(parsed.boxed),
        **box_fields(completion),
        "finish_reason": completion.finish_reason,
        "stop_string": completion.stop_string,
        "is_forced": completion.is_forced,
        "prompt_tokens": completion.prompt_tokens,
        "new_tokens": len(completion.tokens),
        "thought_tokens": counts.thought,
        "answer_tokens": counts.answer,
    }
    if completion.logprobs is not None:
        fields["logprobs"] = [
            {
                **_token(token, tokenizer),
                "logprob": value,
                "top": [{**_token(other, tokenizer), "logprob": likely} for other, likely in top],
            }
            for token, value, top in completion.logprobs
        ]
    return fields


def _token(token: int, tokenizer: "Glm4vTokenizer") -> dict[str, Any]:
    return {"id": token, "token": tokenizer.decode([token])}
