"""Token ids to text while they are generated, and where a text has to stop."""

import codecs
from collections.abc import Sequence

import tokenizers

from glm4v_jax.errors import CheckpointError, GenerationError, Glm4vError
from glm4v_jax.generate.text.thinking import TAGS
from glm4v_jax.inputs.text.tokenizer import Glm4vTokenizer

TOOL_TAGS = ("<tool_call>", "</tool_call>", "<arg_key>", "</arg_key>", "<arg_value>", "</arg_value>")
"""What the call of a tool is written with, by checkpoints whose template has tools."""


def _byte_of_character() -> dict[str, int]:
    """The alphabet in which byte-level BPE spells bytes: printable ones as themselves, the rest from U+0100 on."""
    printable = {*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)}
    others = (byte for byte in range(256) if byte not in printable)
    return {chr(byte): byte for byte in printable} | {chr(256 + rank): byte for rank, byte in enumerate(others)}


_BYTES = _byte_of_character()


class TextStream:
    """The text of token ids that come a few at a time, in whole characters.

    All pieces together are `tokenizer.decode(ids, clean_up_tokenization_spaces=False)` of the ids that are shown,
    however the ids were split: a character whose bytes have not all come waits for the next push, and broken UTF-8
    becomes U+FFFD as there. Every id costs the same, in a long run of broken bytes too, where decoding a window of the
    last ids again and again would not.

    Special tokens are not shown, apart from the tags of thoughts, boxes and tool calls, special or not; nor are ids
    without a token, of which the released model's vocabulary has some.
    """

    def __init__(self, tokenizer: Glm4vTokenizer, *, with_special: bool = False) -> None:
        """Start an empty text; `with_special` shows all special tokens.

        Raises:
            CheckpointError: the tokenizer's tokens do not stand for bytes.
        """
        backend = tokenizer.backend_tokenizer
        if not isinstance(backend.decoder, tokenizers.decoders.ByteLevel):
            raise CheckpointError(
                f"tokenizer.json: found the decoder {type(backend.decoder).__name__}; expected ByteLevel, as of GLM-4"
            )
        self._id_to_token = backend.id_to_token
        added = backend.get_added_tokens_decoder()
        hidden = {index for index, token in added.items() if token.special and token.content not in (*TAGS, *TOOL_TAGS)}
        self._hidden = set[int]() if with_special else hidden
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, ids: Sequence[int]) -> str:
        """Take the next ids and return the text that has become certain.

        Raises:
            Glm4vError: one of `ids` is negative.
        """
        return self._decoder.decode(b"".join(self.bytes_of(int(index)) for index in ids))

    def finish(self) -> str:
        """Return what is left, the bytes of an unfinished character as U+FFFD; the text ends here."""
        return self._decoder.decode(b"", final=True)

    def bytes_of(self, index: int) -> bytes:
        """Return the bytes of one token, none of a token that is not shown.

        Raises:
            Glm4vError: `index` is negative.
        """
        if index < 0:
            raise Glm4vError(f"token ids: found {index}; expected integers of at least 0")
        token = None if index in self._hidden else self._id_to_token(index)
        if token is None:
            return b""
        try:
            return bytes([_BYTES[character] for character in token])
        except KeyError:  # an added token may hold any character, and then stands for itself
            return token.encode()


class StopStrings:
    """Finds the first of some strings in a text that is being written.

    The first one is the one that is complete first, since a generation stops there; of those that end at the same
    character the longest. Both depend on the text alone and not on where it was cut into pushes. A push looks at its
    own text and at what is held back, which is shorter than the longest stop string.
    """

    def __init__(self, strings: str | Sequence[str]) -> None:
        """Look for `strings`, one or several; without any, all text passes through.

        Raises:
            GenerationError: one of them is empty or not a string.
        """
        self._strings = (strings,) if isinstance(strings, str) else tuple(strings)
        for string in self._strings:
            if not isinstance(string, str) or not string:
                raise GenerationError(f"stop_strings: found {string!r}; expected strings of at least one character")
        self._longest = max(map(len, self._strings), default=0)
        self._held = ""
        self._hit: str | None = None

    def push(self, text: str) -> tuple[str, str | None]:
        """Take the next piece of text.

        Returns:
            The text that may be shown now, and the stop string that was found or None. With a stop string the text ends
            before it; after that every push returns no text and the same stop string.
        """
        if self._hit is not None:
            return "", self._hit
        text = self._held + text
        found = [(start + len(string), start, string) for string in self._strings if (start := text.find(string)) >= 0]
        if found:
            _, start, self._hit = min(found)
            self._held = ""
            return text[:start], self._hit
        cut = self._start_of_unfinished(text)
        self._held = text[cut:]
        return text[:cut], None

    def finish(self) -> str:
        """Return what was held back, which turned out to be no stop string; the text ends here."""
        held, self._held = self._held, ""
        return held

    def _start_of_unfinished(self, text: str) -> int:
        """Index of the longest end of `text` with which a stop string begins."""
        for start in range(max(len(text) - self._longest + 1, 0), len(text)):
            if any(string.startswith(text[start:]) for string in self._strings):
                return start
        return len(text)


class TokenStops:
    """Finds the token that completes one of some strings, as the reference's `StopStringCriteria` does.

    Special tokens are text, and a string may begin in the prompt; one that ends there does not count.
    """

    def __init__(self, strings: Sequence[str], tokenizer: Glm4vTokenizer, prompt: Sequence[int]) -> None:
        """Look for `strings` after the tokens of `prompt`."""
        self._stream = TextStream(tokenizer, with_special=True)
        longest = max(map(len, strings), default=0)
        # A character has four bytes at most, and nearly every token at least one.
        before = self._stream.push(prompt[max(0, len(prompt) - 4 * longest) :])
        self._stops = [StopStrings(string) for string in strings]
        for string, stop in zip(strings, self._stops, strict=True):
            stop.push(before[len(before) - min(len(before), len(string) - 1) :])

    def push(self, token: int) -> bool:
        """Take the next token; whether a string ends in it, or in one before it."""
        text = self._stream.push([token])
        return any(stop.push(text)[1] is not None for stop in self._stops)
