"""What generation gives back: pieces of an answer while it is written, and the whole of it at the end."""

import dataclasses
from collections.abc import Iterable
from typing import Any, Literal, NamedTuple

from glm4v_jax.errors import GenerationError
from glm4v_jax.generate.text.boxes import find_boxes, to_pixels
from glm4v_jax.generate.text.thinking import END_THINK, Parsed, Part, parse
from glm4v_jax.inputs.text.tokenizer import Glm4vTokenizer

FinishReason = Literal["stop", "length", "repetition", "cancelled", "error"]


class TokenLogprob(NamedTuple):
    """Log probability of a token under the model, before repetition penalty, temperature and cuts.

    logprob: None for a token that was not the model's choice but the engine's (the end of a thought out of budget).
    top: the likeliest tokens and theirs, best first.
    """

    token: int
    logprob: float | None
    top: tuple[tuple[int, float], ...]


@dataclasses.dataclass(frozen=True)
class Completion:
    """An answer.

    Attributes:
      index: number of the prompt among those given.
      text: as the model wrote it, tags of thought, answer and boxes included, other special tokens left out; ends
        before a stop string.
      tokens: new tokens, the one that ended it included.
      prompt_tokens: tokens of the prompt, those of pictures and videos included.
      finish_reason: "stop" for an end token or stop string, "length" for too many tokens, "repetition" for a text that
        goes in circles, "cancelled" for a stream that was closed, "error" for a prompt that could not be prepared.
      stop_string: the one that was met.
      logprobs: one a token, where asked for.
      image_sizes: (width, height) of the prompt's pictures as given, in pixels.
      error: what was wrong with the prompt, where errors are not raised.
      is_forced: whether the thought was closed because its budget was used up.
      seconds: from when it was its turn until it ended, others being answered beside it.
    """

    index: int
    text: str
    tokens: tuple[int, ...]
    prompt_tokens: int
    finish_reason: FinishReason
    stop_string: str | None = None
    logprobs: tuple[TokenLogprob, ...] | None = None
    image_sizes: tuple[tuple[int, int], ...] = ()
    error: str | None = None
    is_forced: bool = False
    seconds: float = dataclasses.field(default=0.0, compare=False)

    @property
    def parsed(self) -> Parsed:
        """Thought, answer and boxed answer."""
        return parse(self.text)

    @property
    def answer(self) -> str:
        """The answer without thought and tags."""
        return self.parsed.answer

    @property
    def thought(self) -> str | None:
        """The thought; None where the model did not think."""
        return self.parsed.thought

    @property
    def boxes(self) -> list[tuple[float, float, float, float]]:
        """Boxes (x1, y1, x2, y2) that the answer names, 0 to 1000 of width and height."""
        return find_boxes(self.text)

    def pixel_boxes(self, image: int = 0) -> list[tuple[int, ...]]:
        """`boxes` in pixels of the prompt's picture number `image`, as it was before any resize.

        Raises:
          IndexError: there is no such picture.
        """
        return to_pixels(self.boxes, *self.image_sizes[image])


class Delta(NamedTuple):
    """The next piece of an answer.

    text: what is new of `Completion.text`.
    parts: the same by kind, without tags.
    tokens: new tokens.
    completion: the whole, with the last piece.
    """

    text: str
    parts: tuple[Part, ...]
    tokens: tuple[int, ...]
    completion: Completion | None = None


def last(deltas: Iterable[Delta]) -> Completion:
    """The completion at the end of a stream.

    Raises:
      GenerationError: the stream was closed before its end.
    """
    completion = None
    for delta in deltas:
        completion = delta.completion
    if completion is None:
        raise GenerationError("found a stream without an end; expected one that nobody closed")
    return completion


@dataclasses.dataclass(frozen=True)
class Counts:
    """Tokens of an answer.

    thought: up to the end of the thought, `</think>` included.
    answer: behind it.
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


def completion_fields(completion: "Completion", tokenizer: "Glm4vTokenizer") -> dict[str, Any]:
    """What there is to say of a completion, as JSON has it.

    `boxes` (0 to 1000) come with `pixel_boxes` where the prompt had exactly one picture.
    """
    parsed = completion.parsed
    counts = Counts.of(completion, tokenizer)
    fields: dict[str, Any] = {
        "text": completion.text,
        "thought": parsed.thought,
        "answer": parsed.answer,
        "boxed": list(parsed.boxed),
        "boxes": [list(box) for box in completion.boxes],
    }
    if len(completion.image_sizes) == 1:
        fields["pixel_boxes"] = [list(box) for box in completion.pixel_boxes()]
    fields |= {
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
