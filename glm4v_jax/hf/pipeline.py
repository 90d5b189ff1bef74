"""`pipeline("image-text-to-text", model=dir)`: messages in, text out."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from glm4v_jax.errors import ConfigError, MessageError
from glm4v_jax.hf.model import Glm4vForConditionalGeneration
from glm4v_jax.inputs.processor import Glm4vProcessor

TASK = "image-text-to-text"

Message = Mapping[str, Any]


class ImageTextToTextPipeline:
    """Processor and model put together; the reference's `ImageTextToTextPipeline` for conversations."""

    def __init__(self, model: Glm4vForConditionalGeneration, processor: Glm4vProcessor):
        self.model = model
        self.processor = processor

    def __call__(
        self,
        text: Sequence[Message] | Sequence[Sequence[Message]],
        *,
        return_full_text: bool = True,
        **generate_kwargs: Any,
    ) -> list[dict[str, Any]] | list[list[dict[str, Any]]]:
        """Answer a conversation, or several in one batch.

        Args:
          text: a list of messages, or a list of such lists.
          return_full_text: put the answer at the end of the conversation; otherwise give its text alone.
          **generate_kwargs: for `Glm4vForConditionalGeneration.generate`.

        Returns:
          For each conversation `[{"input_text": its messages, "generated_text": ...}]`; for a single one just that
          list.

        Raises:
          MessageError: `text` holds no conversation.
          GenerationError, MediaError: see `generate` and `Glm4vProcessor.apply_chat_template`.
        """
        if not isinstance(text, list | tuple):
            raise MessageError(
                f"text: found {type(text).__name__}; expected a conversation, or a list of conversations"
            )
        single = bool(text) and isinstance(text[0], Mapping)
        conversations: list[Any] = [list(text)] if single else list(text)
        if not conversations or not all(conversations):
            raise MessageError("text: found no messages; expected a conversation, or a list of conversations")
        for conversation in conversations:
            if not isinstance(conversation, list | tuple):
                raise MessageError(f"text: found a list of {type(conversation).__name__}; expected messages")
        inputs = self.processor.apply_chat_template(
            conversations, add_generation_prompt=True, tokenize=True, return_dict=True, padding=True
        )
        ids = self.model.generate(**inputs, **generate_kwargs)
        answers = self.processor.post_process_image_text_to_text(ids[:, np.shape(inputs["input_ids"])[1] :])
        results = []
        for conversation, answer in zip(conversations, answers, strict=True):
            full = [*conversation, {"role": "assistant", "content": answer}]
            results.append([{"input_text": conversation, "generated_text": full if return_full_text else answer}])
        return results[0] if single else results


def pipeline(
    task: str = TASK,
    model: str | Path | Glm4vForConditionalGeneration | None = None,
    *,
    processor: Glm4vProcessor | None = None,
    **model_kwargs: Any,
) -> ImageTextToTextPipeline:
    """Make a pipeline.

    Args:
      task: "image-text-to-text", the only one.
      model: a checkpoint directory, or a loaded model together with `processor`.
      processor: in place of the checkpoint's.
      **model_kwargs: for `Glm4vForConditionalGeneration.from_pretrained`.

    Raises:
      ConfigError: the task is another, or there is no model, or no processor for it.
      CheckpointError: see `from_pretrained`.
    """
    if task != TASK:
        raise ConfigError(f"task: found {task!r}; expected {TASK!r}")
    if isinstance(model, str | Path):
        processor = processor or Glm4vProcessor.from_pretrained(model)
        model = Glm4vForConditionalGeneration.from_pretrained(model, **model_kwargs)
    if model is None or processor is None:
        raise ConfigError("model: expected a checkpoint directory, or a loaded model and its processor")
    return ImageTextToTextPipeline(model, processor)
