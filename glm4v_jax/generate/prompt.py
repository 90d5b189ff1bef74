"""What a caller may ask -> the `Prompt` that the engine answers."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from glm4v_jax.config.model import Glm4vConfig
from glm4v_jax.errors import MessageError
from glm4v_jax.inputs.processor import Glm4vProcessor
from glm4v_jax.inputs.prompt import Prompt, prompts_of
from glm4v_jax.inputs.text.messages import extract_media


def is_message(value: Any) -> bool:
    """Whether a value is one message of a conversation."""
    return isinstance(value, Mapping) and "role" in value


def prompt_of(prompt: Any, processor: Glm4vProcessor, config: Glm4vConfig, **variables: Any) -> Prompt:
    """Make one prompt ready.

    Args:
      prompt: the user's text; or messages, or one message, with `role` and `content`; or a processor's output for one
        prompt; or what this returns.
      processor, config: of the model.
      **variables: for the chat template, such as `tools`; only messages have one.

    Raises:
      MessageError, MediaError: what is wrong with it.
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
