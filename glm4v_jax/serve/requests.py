"""Bodies of requests -> what is asked of the engine."""

import dataclasses
import re
import secrets
from collections.abc import Mapping, Sequence
from typing import Any

from glm4v_jax.config.generation import GenerationConfig
from glm4v_jax.config.grammar import KINDS
from glm4v_jax.generate.text.tool_calls import has_name
from glm4v_jax.serve.bodies import (
    MAX_CHOICES,
    ChatBody,
    GenerationBody,
    TemplateBody,
    TextBody,
    TokenizeBody,
    checked_body,
)
from glm4v_jax.serve.errors import ApiError, field_name, shown

_SMALLEST_TEMPERATURE = 1e-30

DIRECT = {
    "top_p": "top_p",
    "min_p": "min_p",
    "repetition_penalty": "repetition_penalty",
    "min_tokens": "min_new_tokens",
    "no_repeat_ngram_size": "no_repeat_ngram_size",
    "stop_repetition": "stop_repetition",
}
"""Fields of a body -> those of `GenerationConfig` that mean the same."""


@dataclasses.dataclass(frozen=True)
class Served:
    """What of the model decides which requests are valid.

    Attributes:
      name: of the model.
      max_model_len: the most tokens of prompt and completion together.
      variables: what the chat template reads besides messages.
      max_choices: of a request.
      has_template: whether there is a chat template: base models have none.
    """

    name: str
    max_model_len: int
    variables: frozenset[str] = frozenset()
    max_choices: int = MAX_CHOICES
    has_template: bool = True


@dataclasses.dataclass(frozen=True)
class ApiRequest:
    """What a request asks of the engine.

    Attributes:
      prompts: messages, or texts and lists of tokens.
      is_chat: whether the answer is a message, with its thought apart.
      options: fields of `GenerationConfig`, without the limits below.
      max_tokens, think_budget, answer_budget: limits as given.
      stop_tokens: tokens that end the answer, besides those of the options.
      n: choices for each prompt.
      is_stream: whether the answer is sent while it is generated.
      with_usage: whether a stream ends with token counts.
      with_reasoning: whether thoughts are sent.
      variables: for the chat template.
      tools: functions that the model may call.
      has_single_call: whether calls after the first are dropped.
      warnings: fields that are ignored.
    """

    prompts: tuple[Any, ...]
    is_chat: bool
    options: Mapping[str, Any]
    max_tokens: int | None = None
    think_budget: int | None = None
    answer_budget: int | None = None
    stop_tokens: tuple[int, ...] = ()
    n: int = 1
    is_stream: bool = False
    with_usage: bool = False
    with_reasoning: bool = True
    variables: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    tools: tuple[Mapping[str, Any], ...] = ()
    has_single_call: bool = False
    warnings: tuple[str, ...] = ()

    @property
    def has_grammar(self) -> bool:
        """Whether the answer follows a grammar; what seem to be tags in it are text."""
        return any(kind in self.options for kind in KINDS)


def chat_request(body: Mapping[str, Any], served: Served) -> ApiRequest:
    """Read the body of POST /v1/chat/completions.

    >>> body = {"messages": [{"role": "user", "content": "Hello"}], "temperature": 0, "max_completion_tokens": 8}
    >>> request = chat_request(body, Served("tiny", 1024))
    >>> request.options["do_sample"], request.max_tokens
    (False, 8)

    Raises:
      ApiError: a field is invalid, or is not built and would change the answer.
    """
    given, warnings = checked_body(ChatBody, body, served.name)
    if given.top_logprobs and not given.logprobs:
        raise _invalid("top_logprobs", given.top_logprobs, "logprobs: true beside it")
    tools = _tools(given, served)
    variables, thinks = _variables(given, served, warnings, tools)
    request = _request(
        given,
        served,
        (given.messages,),
        warnings,
        is_chat=True,
        logprobs=(given.top_logprobs or 0) if given.logprobs else None,
        max_tokens=given.max_tokens if given.max_completion_tokens is None else given.max_completion_tokens,
        with_reasoning=given.include_reasoning,
        variables=variables,
        tools=tuple(tools),
        has_single_call=not given.parallel_tool_calls,
    )
    return request if thinks else dataclasses.replace(request, think_budget=0)


def text_request(body: Mapping[str, Any], served: Served) -> ApiRequest:
    """Read the body of POST /v1/completions; raises as `chat_request` does."""
    given, warnings = checked_body(TextBody, body, served.name)
    return _request(
        given,
        served,
        _prompts(given.prompt),
        warnings,
        is_chat=False,
        logprobs=given.logprobs,
        max_tokens=given.max_tokens,
    )


def tokenize_request(body: Mapping[str, Any], served: Served) -> tuple[TokenizeBody, dict[str, Any]]:
    """Read the body of POST /tokenize: its fields, and the variables of the chat template; raises as `chat_request`."""
    given, warnings = checked_body(TokenizeBody, body, served.name)
    if (given.prompt is None) == (given.messages is None):
        found = "neither" if given.prompt is None else "both"
        raise ApiError(400, f"prompt, messages: found {found}; expected one of the two", param="prompt")
    return given, _variables(given, served, warnings, _tools(given, served))[0]


def generation_config(
    request: ApiRequest, base: GenerationConfig, prompt_tokens: int, close_tokens: int, max_model_len: int
) -> GenerationConfig:
    """The options of a request, with limits that leave prompt and completion within the model's length.

    A thought budget lies within `max_tokens`, if that is given: the answer may take what the thought leaves.

    Args:
      request: what is asked.
      base: the server's options, changed by those of the request.
      prompt_tokens: of the prompt.
      close_tokens: what closing a thought takes, or beginning without one.
      max_model_len: see `Served`.

    Raises:
      ApiError: there is no room.
    """
    room = max_model_len - prompt_tokens
    asked = request.max_tokens
    if room < 1 or (asked is not None and asked > room):
        wanted = "" if asked is None else f" and {asked:,} tokens of completion"
        raise ApiError(
            400,
            f"{'messages' if request.is_chat else 'prompt'}: found {prompt_tokens:,} tokens{wanted}; expected at most "
            f"{max_model_len:,} in all, the length that this server was started with",
            param="messages" if request.is_chat else "prompt",
            code="context_length_exceeded",
        )
    limit = room if asked is None else asked
    new_tokens = limit if asked is not None else min(base.max_new_tokens or room, room)
    thought, answer = base.think_budget if request.think_budget is None else request.think_budget, None
    if thought is not None:
        rest = limit - thought - close_tokens
        answer = min(request.answer_budget or base.answer_budget or (rest if asked is not None else new_tokens), rest)
        if answer < 1 and thought:  # the limit comes before the budget
            thought = answer = None
        elif answer < 1:
            answer = 1
    eos = tuple(dict.fromkeys((*base.eos_token_id, *request.stop_tokens)))
    return dataclasses.replace(
        base, max_new_tokens=new_tokens, think_budget=thought, answer_budget=answer, eos_token_id=eos
    )


def _request(
    given: GenerationBody,
    served: Served,
    prompts: Sequence[Any],
    warnings: list[str],
    *,
    is_chat: bool,
    logprobs: int | None,
    max_tokens: int | None,
    **more: Any,
) -> ApiRequest:
    if given.best_of not in (None, given.n):
        raise _invalid("best_of", given.best_of, "n")
    if (found := len(prompts) * given.n) > served.max_choices:
        field = "n" if len(prompts) == 1 else "prompt, n"
        expected = f"at most {served.max_choices}, as many as this server takes at a time"
        raise ApiError(400, f"{field}: found {shown(found)} choices; expected {expected}", param="n")
    options = {option: getattr(given, field) for field, option in DIRECT.items()}
    options |= _sampling(given) | _stops(given) | _grammar(given)
    options["logprobs"] = logprobs
    stream_options = given.stream_options or {}
    if stream_options and not given.stream:
        raise _invalid("stream_options", stream_options, "stream: true beside it")
    with_usage = stream_options.get("include_usage")
    if with_usage is not None and not isinstance(with_usage, bool):
        raise _invalid("stream_options.include_usage", with_usage, "true or false")
    if unknown := [name for name in stream_options if name != "include_usage"]:
        warnings.append(f"stream_options: ignored, but for include_usage: {len(unknown)} more")
    return ApiRequest(
        tuple(prompts),
        is_chat,
        {name: value for name, value in options.items() if value is not None},
        max_tokens,
        _think_budget(given),
        given.answer_budget,
        tuple(given.stop_token_ids or ()),
        given.n,
        given.stream,
        bool(with_usage),
        warnings=tuple(warnings),
        **more,
    )


def _think_budget(given: GenerationBody) -> int | None:
    return given.think_budget if given.thinking_token_budget is None else given.thinking_token_budget


def _sampling(given: GenerationBody) -> dict[str, Any]:
    options: dict[str, Any] = {}
    if given.temperature is not None:
        if given.temperature < _SMALLEST_TEMPERATURE:
            options["do_sample"] = False
        else:
            options |= {"do_sample": True, "temperature": given.temperature}
    if given.top_k is not None:
        options["top_k"] = max(given.top_k, 0)  # -1 switches it off, too
    # Without a seed an answer may differ from the one before: clients ask again for that.
    options["seed"] = secrets.randbits(32) if given.seed is None else given.seed % 2**32
    if given.logit_bias:
        if not all(re.fullmatch(r"\d{1,9}", token) for token in given.logit_bias):
            raise _invalid("logit_bias", given.logit_bias, "token ids as names")
        options["sequence_bias"] = tuple(((int(token),), bias) for token, bias in given.logit_bias.items())
    return options


def _stops(given: GenerationBody) -> dict[str, Any]:
    options: dict[str, Any] = {}
    if given.stop:
        options["stop_strings"] = (given.stop,) if isinstance(given.stop, str) else tuple(filter(None, given.stop))
    if given.ignore_eos:
        options["eos_token_id"] = -1
    return options


def _grammar(given: GenerationBody) -> dict[str, Any]:
    """`json_schema`, `regex` or `choices`, from wherever a client may say it."""
    found: list[tuple[str, str, Any]] = []
    form = given.response_format or {}
    kind = form.get("type")
    if given.response_format is not None and kind not in ("text", "json_object", "json_schema"):
        raise _invalid("response_format.type", kind, "one of 'text', 'json_object', 'json_schema'")
    if kind == "json_object":
        found.append(("response_format", "json_schema", {}))
    if kind == "json_schema":
        inner = form.get("json_schema")
        schema = inner.get("schema") if isinstance(inner, dict) else None
        if not isinstance(schema, dict):
            raise _invalid("response_format.json_schema.schema", schema, "a JSON schema, as an object")
        found.append(("response_format", "json_schema", schema))
    structured = {name: value for name, value in (given.structured_outputs or {}).items() if value not in (None, False)}
    names = {"json": "json_schema", "json_object": "json_schema", "regex": "regex", "choice": "choices"}
    for name, value in structured.items():
        if name not in names:
            raise ApiError(
                400,
                f"structured_outputs.{field_name(name)}: found some; expected one of {', '.join(names)}",
                param="structured_outputs",
            )
        found.append((f"structured_outputs.{name}", names[name], {} if name == "json_object" else value))
    for name, value in (("json", given.guided_json), ("regex", given.guided_regex), ("choice", given.guided_choice)):
        if value is not None:
            found.append((f"guided_{name}", names[name], value))
    if len(found) > 1:
        raise ApiError(400, f"{found[1][0]}: found beside {found[0][0]}; expected one of them", param=found[1][0])
    for field, option, value in found:
        if option == "choices" and not (value and isinstance(value, list) and all(isinstance(x, str) for x in value)):
            raise _invalid(field, value, "a list of at least one string")
    return {option: tuple(value) if option == "choices" else value for _, option, value in found}


def _prompts(prompt: Any) -> list[Any]:
    """Texts and lists of token ids."""
    is_one = isinstance(prompt, str) or (bool(prompt) and _is_token(prompt[0]))
    prompts = [prompt] if is_one else prompt
    for one in prompts:
        if not one or not (isinstance(one, str) or (isinstance(one, list) and all(map(_is_token, one)))):
            raise _invalid("prompt", one, "text, or a list of token ids, none of them empty")
    if not prompts:
        raise _invalid("prompt", prompt, "at least one")
    return list(prompts)


def _is_token(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**31


_OF_THE_SERVER = frozenset({"messages", "tools", "documents", "add_generation_prompt"})


def _variables(
    given: TemplateBody, served: Served, warnings: list[str], tools: Sequence[Mapping[str, Any]]
) -> tuple[dict[str, Any], bool]:
    """What the chat template is given besides the messages, and whether the model may think."""
    if not (served.has_template or (isinstance(given, TokenizeBody) and given.messages is None)):
        expected = "'prompt' for /v1/completions: this model has no chat template"
        raise ApiError(400, f"messages: found a chat; expected {expected}", param="messages")
    variables = dict(given.chat_template_kwargs or {})
    if given.thinking is not None:
        variables.setdefault("enable_thinking", given.thinking.get("type") != "disabled")
    if given.reasoning_effort == "none":
        variables.setdefault("enable_thinking", False)
    elif given.reasoning_effort is not None and "reasoning_effort" not in served.variables:
        warnings.append("reasoning_effort: ignored; thinking_token_budget caps a thought")
    if isinstance(given, GenerationBody) and _think_budget(given) == 0:
        variables["enable_thinking"] = False
    thinks = variables.get("enable_thinking", True)
    if not isinstance(thinks, bool):
        raise _invalid("chat_template_kwargs.enable_thinking", thinks, "true or false")
    if "enable_thinking" not in served.variables:
        variables.pop("enable_thinking", None)
    for name in variables:
        if name in served.variables - _OF_THE_SERVER:
            continue
        field = f"chat_template_kwargs.{field_name(name)}"
        known = sorted(served.variables - _OF_THE_SERVER)
        expected = f"some of {', '.join(known)}" if known else "none"
        raise ApiError(
            400,
            f"{field}: found {shown(variables[name])}, which the chat template of this model does not know; "
            f"expected {expected}",
            param="chat_template_kwargs",
        )
    return variables | ({"tools": list(tools)} if tools else {}), thinks


def _tools(given: TemplateBody, served: Served) -> list[dict[str, Any]]:
    """The tools that the prompt shows."""
    if not given.tools or given.tool_choice == "none":
        return []
    if "tools" not in served.variables:
        expected = "none: the chat template of this model has no place for them"
        raise ApiError(400, f"tools: found {len(given.tools)}; expected {expected}", param="tools")
    if given.tool_choice not in (None, "auto"):
        raise _invalid("tool_choice", given.tool_choice, "'auto' or 'none'")
    for tool in given.tools:
        if not has_name(tool):
            raise _invalid("tools", tool, "objects with function.name")
    return given.tools


def _invalid(field: str, value: Any, expected: str) -> ApiError:
    return ApiError(400, f"{field}: found {shown(value)}; expected {expected}", param=field)
