"""Special tokens that stand in what people write, as text: a message that says `<|image|>` shows no image.

They are marked before the chat template is rendered, so that those of the template are the only ones in the prompt, and
restored when it is encoded.

>>> from glm4v_jax.inputs.text.tokenizer import Glm4vTokenizer
>>> from glm4v_jax.tiny import TINY_CHECKPOINT
>>> tokenizer = Glm4vTokenizer.from_pretrained(TINY_CHECKPOINT)
>>> literals = Literals(tokenizer)
>>> (message,) = literals.marked([{"role": "user", "content": "What is <|user|>?"}])
>>> ids = literals.encode("<|user|>" + message["content"])
>>> tokenizer.decode(ids), ids.count(tokenizer.convert_tokens_to_ids("<|user|>"))
('<|user|>What is <|user|>?', 1)
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from glm4v_jax.inputs.text.messages import SOURCE_KEYS, Message
from glm4v_jax.inputs.text.tokenizer import Glm4vTokenizer

# Of the private use area, which text has no use for; a message that has it all the same gets it back.
_MARK = "\U0010fffd"
_FIRST = 0x10F000

# What the model is trained to write, and people write to it, some of them special in some checkpoints.
_TAGS = re.compile(r"</?(think|answer|tool_call|tool_response|arg_key|arg_value)>|<\|(begin|end)_of_box\|>|/nothink")
_SOURCES = tuple(key for keys in SOURCE_KEYS.values() for key in keys)


class Literals:
    """Marks special tokens in messages, and encodes prompts with such marks; tags of thoughts and boxes stay tokens."""

    def __init__(self, tokenizer: Glm4vTokenizer) -> None:
        self._tokenizer = tokenizer
        special = [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]
        # Longest first: where one begins with another, the longer is the token.
        special.sort(key=len, reverse=True)
        self._literals = [_MARK, *(token for token in special if not _TAGS.fullmatch(token))]
        self._found = re.compile("|".join(map(re.escape, self._literals)))
        self._special = re.compile(f"({'|'.join(map(re.escape, special))})" if special else r"(\b\B)")

    def marked(self, messages: Sequence[Message]) -> list[dict[str, Any]]:
        """Mark the special tokens in messages of `normalise_messages`, wherever a chat template may print them."""
        return [{name: self._marked_field(value) for name, value in message.items()} for message in messages]

    def marked_value(self, value: Any) -> Any:
        """Mark the special tokens in all strings of a value."""
        if isinstance(value, str):
            return self._found.sub(lambda match: _MARK + chr(_FIRST + self._literals.index(match[0])), value)
        if isinstance(value, Mapping):
            return {self.marked_value(key): self.marked_value(item) for key, item in value.items()}
        return [self.marked_value(item) for item in value] if isinstance(value, list | tuple) else value

    def encode(self, prompt: str, *, add_special_tokens: bool = True) -> list[int]:
        """Token ids of a prompt whose marked tokens are text."""
        parts = [
            # Every second part is a special token.
            (part if index % 2 else self._restored(part), bool(index % 2))
            for index, part in enumerate(self._special.split(prompt))
        ]
        return self._tokenizer.encode_parts(parts, add_special_tokens=add_special_tokens)

    def _marked_field(self, value: Any) -> Any:
        """A field of a message; items of its content keep what names media, which may be megabytes."""
        if not isinstance(value, list):
            return self.marked_value(value)
        return [
            {key: entry if key in _SOURCES else self.marked_value(entry) for key, entry in item.items()}
            if isinstance(item, Mapping) and item.get("type") in SOURCE_KEYS
            else self.marked_value(item)
            for item in value
        ]

    def _restored(self, text: str) -> str:
        return re.sub(f"{_MARK}(.)", lambda match: self._literals[ord(match[1]) - _FIRST], text)


def has_literals(prompt: str) -> bool:
    """Whether a prompt has marked tokens."""
    return _MARK in prompt
