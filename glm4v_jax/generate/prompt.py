"""What a caller may ask -> the `Prompt` that the engine answers."""

import dataclasses
from collections.abc import Mapping
from typing import Annotated, Any

from msgspec import Meta

from glm4v_jax.config.checks import checked, fault
from glm4v_jax.config.generation import GenerationConfig
from glm4v_jax.config.model import Glm4vConfig
from glm4v_jax.errors import GenerationError, MessageError
from glm4v_jax.generate.text.tool_calls import has_name
from glm4v_jax.inputs.processor import Glm4vProcessor
from glm4v_jax.inputs.prompt import Prompt, prompts_of
from glm4v_jax.inputs.text.messages import extract_media

_CHAT_OPTIONS: Mapping[str, Any] = {
    "tools": Annotated[list[dict[str, Any]], Meta(description="a list of objects with 'function'")],
    "enable_thinking": bool,
}
CHAT_OPTIONS = tuple(_CHAT_OPTIONS)
"""Options of a request that are for the chat template: the functions that the model may call, whether it may think."""


def split_options(options: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Split the options of a request into those for the chat template, and fields of `GenerationConfig`.

    >>> split_options({"tools": [], "enable_thinking": False, "seed": 7})
    ({'tools': [], 'enable_thinking': False}, {'seed': 7, 'think_budget': 0})

    Raises:
      GenerationError: one for the template is not what it should be.
    """
    variables = {
        name: checked(name, options[name], hint, GenerationError)
        for name, hint in _CHAT_OPTIONS.items()
        if options.get(name) is not None
    }
    for tool in variables.get("tools", ()):
        if not has_name(tool):
            raise GenerationError(fault("tools", tool, "objects with function.name"))
    others = {name: value for name, value in options.items() if name not in CHAT_OPTIONS}
    if variables.get("enable_thinking") is False:
        others["think_budget"] = 0
    return variables, others


def chat_variables(variables: Mapping[str, Any], config: GenerationConfig, processor: Glm4vProcessor) -> dict[str, Any]:
    """What the chat template is given: the switch of thoughts only where it has one.

    Without one, `SequenceState` puts the end of an empty thought before the answer.

    Raises:
      MessageError: there are tools, and the template has no place for them.
    """
    variables = dict(variables)
    if variables.get("tools") and "tools" not in processor.template_variables:
        expected = "none: the chat template of this model has no place for them"
        raise MessageError(f"tools: found {len(variables['tools'])}; expected {expected}")
    if config.think_budget == 0:
        variables["enable_thinking"] = False
    if "enable_thinking" not in processor.template_variables:
        variables.pop("enable_thinking", None)
    return variables


def is_message(value: Any) -> bool:
    """Whether a value is one message of a conversation."""
    return isinstance(value, Mapping) and "role" in value


def prompt_of(prompt: Any, processor: Glm4vProcessor, config: Glm4vConfig, **variables: Any) -> Prompt:
    """Make one prompt ready; MessageError and MediaError say what is wrong with it.

    It is the user's text; or messages, or one message, with `role` and `content`; or a processor's output for one
    prompt; or what this returns. Variables are for the chat template, such as `tools`; only messages have one.
    """
    if isinstance(prompt, Prompt):
        return prompt
    if isinstance(prompt, str):
        prompt = [{"role": "user", "content": prompt}]
    if is_message(prompt):
        prompt = [prompt]
    sizes: tuple[tuple[int, int], ...] = ()
    if not isinstance(prompt, Mapping):
        media = processor.prepare_media(*extract_media(prompt, processor.template()))
        prompt, sizes = processor.prepare_turn(prompt, media, **variables), media.image_sizes
    prompts = prompts_of(prompt, config)
    if len(prompts) != 1:
        raise MessageError(f"input_ids: found {len(prompts)} prompts; expected one")
    return dataclasses.replace(prompts[0], image_sizes=sizes)
