"""The fields that bodies of requests may have, declared once, and the check of a body against them.

They are those of OpenAI's interface and of vLLM's extensions. A field that would change the answer and is not built is
refused by name; any other that is unknown is ignored, and the response lists it under `warnings`.
"""

import dataclasses
from collections.abc import Mapping
from typing import Annotated, Any, TypeVar

from msgspec import Meta

from glm4v_jax.config.checks import Natural, Positive, convert, expectation, hints
from glm4v_jax.serve.errors import ApiError, field_name, shown

T = TypeVar("T", bound="Body")

MAX_TOP_LOGPROBS = 20
MAX_CHOICES = 128

TopLogprobs = Annotated[int, Meta(ge=0, le=MAX_TOP_LOGPROBS)]
Tokens = Annotated[list[Natural], Meta(min_length=1)]
_String = Annotated[str, Meta(max_length=256)]
Strings = Annotated[
    # Every token is compared with them, in the engine's thread.
    _String | Annotated[list[_String], Meta(max_length=16)],
    Meta(description="a string, or a list of up to 16, each of at most 256 characters"),
]
StopTokens = Annotated[
    list[Annotated[int, Meta(ge=0, lt=2**31)]], Meta(max_length=8, description="a list of at most 8 token ids")
]
TokenBias = Annotated[
    dict[str, Annotated[float, Meta(ge=-100, le=100)]],
    Meta(max_length=300, description="an object of at most 300 token ids, with numbers from -100 to 100"),
]
Messages = Annotated[list[dict[str, Any]], Meta(min_length=1, description="a list of at least one message")]
Prompts = Annotated[
    str | list[Any], Meta(description="a string, a list of token ids, or a list of strings or of such lists")
]
Choices = Annotated[list[str], Meta(min_length=1, description="a list of at least one string")]
ThinkBudget = Annotated[int, Meta(ge=0, description="an integer of at least 0; 0 switches thoughts off")]

_OFF: tuple[Any, ...] = (None, 0, False, "", [], {})

NOT_BUILT: Mapping[str, tuple[Any, ...]] = {
    "add_generation_prompt": (True,),
    "allowed_token_ids": (),
    "audio": (),
    "bad_words": (),
    "continue_final_message": (),
    "documents": (),
    "echo": (),
    "frequency_penalty": (),
    "function_call": ("none",),
    "functions": (),
    "guided_grammar": (),
    "include_stop_str_in_output": (),
    "length_penalty": (1.0,),
    "logits_processors": (),
    "modalities": (["text"],),
    "prediction": (),
    "presence_penalty": (),
    "prompt_embeds": (),
    "prompt_logprobs": (),
    "separate_reasoning": (True,),
    "skip_special_tokens": (True,),
    "spaces_between_special_tokens": (True,),
    "structural_tag": (),
    "suffix": (),
    "truncate_prompt_tokens": (-1,),
    "use_beam_search": (),
    "web_search_options": (),
}
"""Fields that are not built and would change the answer, with values beside null, 0, false, "" and empty ones that
change nothing."""


@dataclasses.dataclass(kw_only=True)
class Body:
    """Fields that all requests share."""

    model: str | None = None


@dataclasses.dataclass(kw_only=True)
class GenerationBody(Body):
    """Fields of requests that generate."""

    stream: bool = False
    stream_options: dict[str, Any] | None = None
    n: Positive = 1
    best_of: Positive | None = None
    max_tokens: Positive | None = None
    temperature: Annotated[float, Meta(ge=0)] | None = None
    top_p: float | None = None
    top_k: Annotated[int, Meta(ge=-1)] | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    min_tokens: Natural | None = None
    no_repeat_ngram_size: Annotated[int, Meta(ge=0, le=32)] | None = None
    stop_repetition: bool | None = None
    stop: Strings | None = None
    stop_token_ids: StopTokens | None = None
    ignore_eos: bool = False
    seed: int | None = None
    logit_bias: TokenBias | None = None
    thinking_token_budget: ThinkBudget | None = None
    think_budget: ThinkBudget | None = None
    answer_budget: Positive | None = None
    response_format: dict[str, Any] | None = None
    structured_outputs: dict[str, Any] | None = None
    guided_json: dict[str, Any] | str | None = None
    guided_regex: str | None = None
    guided_choice: Choices | None = None


@dataclasses.dataclass(kw_only=True)
class TemplateBody(Body):
    """Fields that the chat template turns into a prompt."""

    chat_template_kwargs: dict[str, Any] | None = None
    reasoning_effort: str | None = None
    thinking: dict[str, Any] | None = None
    tools: Annotated[list[dict[str, Any]], Meta(description="a list of objects")] | None = None
    tool_choice: str | dict[str, Any] | None = None


@dataclasses.dataclass(kw_only=True)
class ChatBody(GenerationBody, TemplateBody):
    """Fields of POST /v1/chat/completions."""

    messages: Messages
    max_completion_tokens: Positive | None = None
    logprobs: bool = False
    top_logprobs: TopLogprobs | None = None
    include_reasoning: bool = True
    parallel_tool_calls: bool = True


@dataclasses.dataclass(kw_only=True)
class TextBody(GenerationBody):
    """Fields of POST /v1/completions."""

    prompt: Prompts
    logprobs: TopLogprobs | None = None


@dataclasses.dataclass(kw_only=True)
class TokenizeBody(TemplateBody):
    """Fields of POST /tokenize."""

    prompt: str | None = None
    messages: Messages | None = None
    add_special_tokens: bool = True
    return_token_strs: bool = False


def checked_body(cls: type[T], body: Mapping[str, Any], model: str) -> tuple[T, list[str]]:
    """The fields of a body, and warnings of those that are ignored."""
    fields = hints(cls)
    given = {name: value for name, value in body.items() if value is not None}
    values, faults = {}, []
    for name, hint in fields.items():
        if name in given:
            try:
                values[name] = convert(given[name], hint)
            except (ValueError, RecursionError):
                faults.append((name, f"{name}: found {shown(given[name])}; expected {expectation(hint)}"))
    required = [field.name for field in dataclasses.fields(cls) if field.default is dataclasses.MISSING]
    for name in required:
        if name not in given:
            faults.append((name, f"{name}: found nothing; expected {expectation(fields[name])}"))
    for name, neutral in NOT_BUILT.items():
        value = given.get(name)
        if value not in _OFF and value not in neutral and name not in fields:
            faults.append((name, f"{name}: found {shown(value)}; expected none: this server does not have it"))
    if faults:
        raise ApiError(400, "; ".join(line for _, line in faults)[:2000], param=faults[0][0])
    instance = cls(**values)
    if instance.model not in (None, "", model):
        message = f"model: found {shown(instance.model)}; expected {model!r}, the only one here"
        raise ApiError(404, message, param="model", code="model_not_found")
    ignored = [name for name in given if name not in fields and name not in NOT_BUILT]
    return instance, [f"{field_name(name)}: ignored" for name in ignored[:20]]
