"""The special tokens of a tokenizer: which there are, by name, and their ids."""

from collections.abc import Mapping
from typing import Any

import tokenizers

from glm4v_jax.errors import CheckpointError, Glm4vError, naming

NAMED_SPECIAL_TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


def added_token(value: Any) -> tokenizers.AddedToken:
    """A token of a configuration: a string, or an object with flags."""
    if isinstance(value, str):
        return tokenizers.AddedToken(value, special=True)
    if not isinstance(value, Mapping) or not isinstance(value.get("content"), str):
        raise CheckpointError(f"found the token {value!r}; expected a string or an object with 'content'")
    try:
        return tokenizers.AddedToken(**{key: flag for key, flag in value.items() if key != "__type"})
    except TypeError as error:
        raise CheckpointError(f"found the token {value!r}, with an unknown flag: {error}") from error


def token_list(config: Mapping[str, Any], name: str) -> list[Any]:
    """The tokens listed in a field of a configuration, none where it is absent or null.

    Raises:
      CheckpointError: the field is not a list.
    """
    value = config.get(name)
    if value is not None and not isinstance(value, (list, tuple)):
        raise CheckpointError(f"{name}: found {value!r}; expected a list of tokens")
    return list(value or [])


def special_tokens_of(config: Mapping[str, Any]) -> dict[str, str | list[str] | None]:
    """The special tokens in the order in which the reference goes through them.

    Raises:
      CheckpointError: a field is not what it should be; the message names it.
    """
    special: dict[str, str | list[str] | None] = {}
    for name in NAMED_SPECIAL_TOKENS:
        value = config.get(name)
        special[name] = None if value is None else _content(value, name)
    extra = config.get("extra_special_tokens")
    # 5.x also names tokens of one model by fields of their own.
    named = {name: value for name, value in config.items() if name.endswith("_token") and isinstance(value, str)}
    named = {name: value for name, value in named.items() if name not in NAMED_SPECIAL_TOKENS}
    more_named = config.get("model_specific_special_tokens")
    named |= more_named if isinstance(more_named, Mapping) else {}
    named |= extra if isinstance(extra, Mapping) else {}
    # 5.x saves under this name, as a list, what 4.57.1 calls additional_special_tokens.
    more = [] if isinstance(extra, Mapping) else token_list(config, "extra_special_tokens")
    special["additional_special_tokens"] = [
        *(_content(token, "additional_special_tokens") for token in token_list(config, "additional_special_tokens")),
        *(_content(token, "extra_special_tokens") for token in more),
    ]
    return special | {name: _content(token, f"extra_special_tokens.{name}") for name, token in named.items()}


def _content(token: Any, name: str) -> str:
    with naming(name, CheckpointError):
        return added_token(token).content


class SpecialTokens:
    """The attributes of a tokenizer that name special tokens; what is not set is None.

    A subclass sets `_backend` and `_special_tokens`.
    """

    _backend: tokenizers.Tokenizer
    _special_tokens: dict[str, str | list[str] | None]

    @property
    def special_tokens_map(self) -> dict[str, str | list[str]]:
        """{attribute name: token}, and a list under `additional_special_tokens`; what is not set is left out."""
        return {name: value for name, value in self._special_tokens.items() if value}

    @property
    def all_special_tokens(self) -> list[str]:
        """Every token that a special attribute names, once."""
        tokens: list[str] = []
        for value in self.special_tokens_map.values():
            tokens += [value] if isinstance(value, str) else value
        return list(dict.fromkeys(tokens))

    @property
    def all_special_ids(self) -> list[int]:
        """The ids of `all_special_tokens`."""
        return [self._backend.token_to_id(token) for token in self.all_special_tokens]

    @property
    def additional_special_tokens(self) -> list[str]:
        """The special tokens that no attribute of their own names."""
        return list(self._special_tokens["additional_special_tokens"] or [])

    def _special_token(self, name: str) -> str | None:
        value = self._special_tokens[name]
        return value if isinstance(value, str) else None

    def _special_id(self, name: str) -> int | None:
        token = self._special_token(name)
        return None if token is None else self._backend.token_to_id(token)

    @property
    def pad_token(self) -> str | None:
        """The token that rows are padded with."""
        return self._special_token("pad_token")

    @pad_token.setter
    def pad_token(self, token: str) -> None:
        if self._backend.token_to_id(token) is None:
            raise Glm4vError(f"pad_token: found {token!r}; expected a token of the vocabulary")
        self._special_tokens["pad_token"] = token

    @property
    def pad_token_id(self) -> int | None:
        """The id of `pad_token`."""
        return self._special_id("pad_token")

    @property
    def eos_token(self) -> str | None:
        """The token that ends a text."""
        return self._special_token("eos_token")

    @property
    def eos_token_id(self) -> int | None:
        """The id of `eos_token`."""
        return self._special_id("eos_token")

    @property
    def bos_token(self) -> str | None:
        """The token that begins a text; GLM-4 has none."""
        return self._special_token("bos_token")

    @property
    def bos_token_id(self) -> int | None:
        """The id of `bos_token`."""
        return self._special_id("bos_token")

    @property
    def unk_token(self) -> str | None:
        """The token of unknown text; GLM-4 has none."""
        return self._special_token("unk_token")

    @property
    def unk_token_id(self) -> int | None:
        """The id of `unk_token`."""
        return self._special_id("unk_token")
