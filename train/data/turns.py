"""The assistant's turns: which of them contribute to the loss, with what text, and where they stand in a rendering."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from glm4v_jax.config.model import Glm4vConfig
from glm4v_jax.config.thinking import THINK
from glm4v_jax.errors import CheckpointError, DataError
from glm4v_jax.generate.text.thinking import without_thoughts
from glm4v_jax.inputs.processor import Glm4vProcessor
from glm4v_jax.inputs.text.chat_template import printable_messages, render_template
from glm4v_jax.inputs.text.messages import reads
from train.data.records import Record, as_sent

# Line breaks at the start of an answer would fuse with the one that ends the header `<|assistant|>\n`, in the released
# tokenizer, to a token that a prompt for generation does not have.
_BLANK_LINES = re.compile(r"\s*[\r\n]+")


def target_turns(
    record: Record, keep_thoughts: str, processor: Glm4vProcessor
) -> tuple[list[dict[str, Any]], list[int]]:
    """Return the messages with the thoughts that are kept, and the indices of those that contribute to the loss.

    A thought in a field of its own stays there if the chat template reads it; else it becomes a part of the content, as
    the model writes it.

    DataError if none contributes, one that does is empty or not the assistant's, or the model has no thoughts or tools.
    """
    thinking, source = processor.thinking, processor.template()
    if record.tools and "tools" not in processor.template_variables:
        raise DataError("tools: found some, which the chat template does not print; expected none, or another model")
    if len(record.losses) != len(record.messages):
        raise DataError(f"losses: found {len(record.losses)}; expected one per message, {len(record.messages)}")
    messages = [dict(as_sent(message)) for message in record.messages]
    targets = [index for index, loss in enumerate(record.losses) if loss]
    if not targets:
        raise DataError("losses: found no message that contributes to the loss; expected one of the assistant")
    for index in targets:
        if messages[index].get("role") != "assistant":
            role = messages[index].get("role")
            raise DataError(f"message {index}: found loss on role {role!r}; expected it on turns of the assistant only")
    last = targets[-1]
    asked = max((index for index in range(last) if messages[index].get("role") == "user"), default=-1)
    for index, message in enumerate(messages):
        said = _plain_text(message)
        if message.get("role") != "assistant" or said is None:
            continue
        thought, answer = message.pop("reasoning_content", ""), without_thoughts(said, thinking)
        is_past = keep_thoughts == "last" and not asked < index <= last
        is_bare = keep_thoughts == "none" or is_past
        if is_past and (thought or answer != said) and index in targets:
            targets.remove(index)
        message["content"] = answer if is_bare else said
        if index in targets:
            message["content"] = _without_blank_lines(message["content"])
            if not message["content"] and "tool_calls" not in message:
                raise DataError(f"message {index}: found an empty answer; expected text")
        if thought and not is_bare:
            if reads(source, "reasoning_content"):
                message["reasoning_content"] = thought
            elif THINK in processor.tokenizer.get_added_vocab():
                message["content"] = thinking.written(thought, message["content"])
            else:
                raise DataError(f"message {index}: found a thought; expected none: the model has no token {THINK}")
    return messages, targets


def _without_blank_lines(text: str) -> str:
    """`text` from its first line on that is not blank."""
    blank = _BLANK_LINES.match(text)
    return text[blank.end() :] if blank else text


def _plain_text(message: Mapping[str, Any]) -> str | None:
    """The text of a message; None if it has other items, which the processor checks."""
    content = message.get("content")
    if isinstance(content, str):
        return content
    items = content if isinstance(content, Sequence) else [None]
    texts = [item.get("text") if isinstance(item, Mapping) and item.get("type") == "text" else None for item in items]
    return "".join(text for text in texts if text is not None) if all(isinstance(t, str) for t in texts) else None


class Template:
    """What a chat template writes around turns, found by rendering conversations that end earlier."""

    def __init__(self, processor: Glm4vProcessor, tools: Sequence[Mapping[str, Any]] = ()) -> None:
        self.source = processor.template()
        self._processor, self._tools = processor, tools

    def _render(self, messages: Sequence[Mapping[str, Any]], add_generation_prompt: bool = False) -> str:
        variables = {**self._processor.tokenizer.special_tokens_map, "tools": list(self._tools) or None}
        return render_template(self.source, messages, add_generation_prompt=add_generation_prompt, **variables)

    def spans(self, messages: Sequence[Mapping[str, Any]], targets: Sequence[int], text: str) -> list[tuple[int, int]]:
        """Return (start, stop) of the answers of turns `targets` in `text`: from the prompt for each to its end."""
        messages = printable_messages(messages, self.source)
        spans = []
        for index in targets:
            before, after = self._render(messages[:index], True), self._render(messages[: index + 1])
            if not (text.startswith(after) and after.startswith(before)):
                raise DataError(
                    f"found a chat template that writes message {index} or earlier ones differently before later ones; "
                    "expected one whose prompts are prefixes of the conversation"
                )
            spans.append((len(before), len(after)))
        return spans

    def stop_token(self, config: Glm4vConfig, *, after_call: bool = False) -> int:
        """Return the id of the first token after an answer where the user speaks next, or a tool after a call.

        Or the tokenizer's `eos_token`, if generation would not stop at the former (`eos_token_id` of the config).

        Raises:
          CheckpointError: generation would stop at neither.
        """
        says: list[dict[str, Any]] = [{"role": role, "content": "x"} for role in ("user", "assistant", "user")]
        if after_call:
            says[1]["tool_calls"] = [{"type": "function", "function": {"name": "x", "arguments": {}}}]
            says[2]["role"] = "tool"
        answered, asked = self._render(says[:2]), self._render(says)
        if not (asked.startswith(answered) and (after_call or answered.endswith("x"))):
            raise CheckpointError("found a chat template that writes text after an answer; expected none")
        tokenizer = self._processor.tokenizer
        follows = tokenizer(asked[len(answered) :], add_special_tokens=False)["input_ids"][0]
        ends = config.text_config.eos_token_id
        if ends is None:
            return follows
        ends = (ends,) if isinstance(ends, int) else ends
        for index in (follows, tokenizer.eos_token_id):
            if index in ends:
                return index
        raise CheckpointError(
            f"eos_token_id: found {list(ends)}; expected {follows} ({tokenizer.convert_ids_to_tokens(follows)}) among "
            f"them, with which the chat template continues after an answer, or the tokenizer's eos_token"
        )
