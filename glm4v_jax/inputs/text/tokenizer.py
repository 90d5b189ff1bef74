"""Text to token ids and back, over the `tokenizers` library.

`Glm4vTokenizer` gives the names and the results of `PreTrainedTokenizerFast` in transformers 4.57.1 on the same files.
The released `tokenizer.json` predates images: `<|image|>` and every later id exist only in `tokenizer_config.json`,
under `added_tokens_decoder`, and are added when the files are read.
"""

import pathlib
import threading
import warnings
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Self

import numpy as np
import tokenizers
from msgspec import Meta

from glm4v_jax.config.checks import Size, checked, raise_faults
from glm4v_jax.errors import CheckpointError, Glm4vError, MessageError, naming, not_there
from glm4v_jax.files import assets_directory, read_json_object, read_text, replacing, write_json
from glm4v_jax.inputs.batch_feature import BatchFeature, check_return_tensors
from glm4v_jax.inputs.text.chat_template import save_chat_template, template_in
from glm4v_jax.inputs.text.special_tokens import (
    NAMED_SPECIAL_TOKENS,
    SpecialTokens,
    added_token,
    special_tokens_of,
    token_list,
)
from glm4v_jax.inputs.text.tokenizer_options import PaddingSide, check_text, checked_limit, padding_strategy

# Configurations write "no limit" as a huge number; the reference calls anything above this one no limit.
_NO_LIMIT = 10**20

_CLEAN_UPS = (
    (" .", "."),
    (" ?", "?"),
    (" !", "!"),
    (" ,", ","),
    (" ' ", "'"),
    (" n't", "n't"),
    (" 'm", "'m"),
    (" 's", "'s"),
    (" 've", "'ve"),
    (" 're", "'re"),
)


# Entries of tokenizer_config.json that are read.
_SETTINGS = frozenset(
    {
        *NAMED_SPECIAL_TOKENS, "additional_special_tokens", "added_tokens_decoder", "chat_template",
        "clean_up_tokenization_spaces", "extra_special_tokens", "max_len", "model_input_names", "model_max_length",
        "padding_side", "split_special_tokens", "truncation_side",
    }
)  # fmt: skip


def stack_rows(rows: Sequence[Sequence[int]], name: str) -> np.ndarray:
    """Rows of equal length as one array [B, T] int64.

    Raises:
      MessageError: the rows differ in length; the message says how to pad them.
    """
    lengths = sorted({len(row) for row in rows})
    if len(lengths) > 1:
        raise MessageError(
            f"{name}: rows of {lengths[0]} to {lengths[-1]} tokens do not make one array; expected equal lengths: "
            "pass padding=True"
        )
    return np.asarray(rows, np.int64)


class Glm4vTokenizer(SpecialTokens):
    """The GLM-4 tokenizer: byte-level BPE, special tokens, padding.

    >>> from glm4v_jax.tiny import TINY_CHECKPOINT
    >>> tokenizer = Glm4vTokenizer.from_pretrained(TINY_CHECKPOINT)
    >>> batch = tokenizer(["What digit is this?", "Hi"], padding=True, return_tensors="np")
    >>> batch.input_ids.shape, tokenizer.batch_decode(batch.input_ids, skip_special_tokens=True)
    ((2, 5), ['What digit is this?', 'Hi'])

    Attributes:
      padding_side, truncation_side: "left" or "right".
      model_max_length: the longest row that the checkpoint claims, in tokens.
      model_input_names: which of `input_ids`, `token_type_ids`, `attention_mask` a call returns by default.
      clean_up_tokenization_spaces: whether `decode` joins punctuation to the word before it by default.
      chat_template: template source, {name: source}, or None.
      init_kwargs: what `tokenizer_config.json` said, with the overrides of `from_pretrained`.
    """

    def __init__(self, backend: tokenizers.Tokenizer, config: Mapping[str, Any] | None = None) -> None:
        """Wrap a backend, which is changed: it gets the added tokens of `config` that it lacks.

        Args:
          backend: what `tokenizers.Tokenizer.from_file` returns.
          config: the content of `tokenizer_config.json`.

        Raises:
          CheckpointError: an added token cannot get the id that `config` says, or a field has an impossible value.
        """
        self.init_kwargs = dict(config or {})
        self._backend = backend
        # Padding and truncation are settings of the backend, so setting them and encoding must be one step.
        self._lock = threading.Lock()
        # They can also be stored in `tokenizer.json`, where they give defaults.
        stored_padding = backend.padding or {}
        defaults = {
            "pad_token": stored_padding.get("pad_token"),
            "padding_side": stored_padding.get("direction", "right"),
            "truncation_side": (backend.truncation or {}).get("direction", "right"),
        }
        config = defaults | self.init_kwargs
        self.padding_side = checked("padding_side", config["padding_side"], PaddingSide, CheckpointError)
        self.truncation_side = checked("truncation_side", config["truncation_side"], PaddingSide, CheckpointError)
        self.model_max_length = checked_limit(config.get("model_max_length", config.get("max_len")))
        names = config.get("model_input_names", ["input_ids", "token_type_ids", "attention_mask"])
        self.model_input_names = list(checked("model_input_names", names, tuple[str, ...], CheckpointError))
        self.clean_up_tokenization_spaces = bool(config.get("clean_up_tokenization_spaces", False))
        self.split_special_tokens = bool(config.get("split_special_tokens", False))
        self.chat_template: str | dict[str, str] | None = template_in(config)
        self.processor_class = str(config.get("processor_class") or "Glm4vProcessor")
        self._special_tokens = special_tokens_of(config)
        self._add_tokens(config.get("added_tokens_decoder", {}))

    @classmethod
    def from_pretrained(cls, directory: str | pathlib.Path, **overrides: Any) -> Self:
        """Read `tokenizer.json` and `tokenizer_config.json` of a checkpoint directory.

        As in the reference, `special_tokens_map.json` counts where the configuration has no `added_tokens_decoder`, and
        `chat_template.jinja` wins over a template in the configuration.

        Args:
          directory: a checkpoint in Hugging Face layout.
          **overrides: entries of `tokenizer_config.json` to replace, such as `padding_side="left"`.

        Raises:
          CheckpointError: a file is missing or corrupt, or an added token cannot get its id.
        """
        if unknown := sorted(set(overrides) - _SETTINGS):
            warnings.warn(f"{cls.__name__}: unknown settings are ignored: {', '.join(unknown)}", stacklevel=2)
        directory = assets_directory(directory)
        if not directory.is_dir():
            raise CheckpointError(not_there(directory, "a checkpoint in Hugging Face layout", kind="directory"))
        path = directory / "tokenizer.json"
        if not path.is_file():
            raise CheckpointError(not_there(path, "the tokenizer of the checkpoint"))
        try:
            backend = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises bare `Exception`
            raise CheckpointError(f"{path}: not a tokenizer ({error})") from error
        config_path = directory / "tokenizer_config.json"
        config = read_json_object(config_path) if config_path.is_file() else {}
        map_path = directory / "special_tokens_map.json"
        if "added_tokens_decoder" not in config and map_path.is_file():
            more = read_json_object(map_path)
            with naming(map_path, CheckpointError):
                special_tokens_of(more)
                tokens = token_list(more, "additional_special_tokens")
            with naming(config_path, CheckpointError):
                listed = token_list(config, "additional_special_tokens")
            config |= more | {"additional_special_tokens": listed + [one for one in tokens if one not in listed]}
        template_path = directory / "chat_template.jinja"
        if template_path.is_file():
            config["chat_template"] = read_text(template_path)
        with naming(config_path, CheckpointError):
            return cls(backend, config | overrides)

    def save_pretrained(self, save_directory: str | pathlib.Path) -> None:
        """Write files that `from_pretrained` here and in transformers loads.

        Args:
          save_directory: made if need be; gets `tokenizer.json`, `tokenizer_config.json` and the chat templates.
        """
        directory = pathlib.Path(save_directory)
        directory.mkdir(parents=True, exist_ok=True)
        with replacing(directory / "tokenizer.json") as aside, self._lock:
            # Left by the last call, and in the way of the next program's.
            self._backend.no_padding()
            self._backend.no_truncation()
            self._backend.save(str(aside))
        flags = ("content", "lstrip", "normalized", "rstrip", "single_word", "special")
        extra = self.init_kwargs.get("extra_special_tokens")
        config = self.init_kwargs | {
            **{name: self._special_tokens[name] for name in (*NAMED_SPECIAL_TOKENS, "additional_special_tokens")},
            "added_tokens_decoder": {
                str(index): {flag: getattr(token, flag) for flag in flags}
                for index, token in sorted(self.added_tokens_decoder.items())
            },
            # 5.x has a list here, whose tokens are among the additional ones.
            "extra_special_tokens": extra if isinstance(extra, Mapping) else {},
            "clean_up_tokenization_spaces": self.clean_up_tokenization_spaces,
            "model_input_names": self.model_input_names,
            "model_max_length": self.model_max_length,
            "padding_side": self.padding_side,
            "processor_class": self.processor_class,
            "split_special_tokens": self.split_special_tokens,
            "tokenizer_class": "PreTrainedTokenizerFast",
            "truncation_side": self.truncation_side,
        }
        config.pop("chat_template", None)
        write_json(directory / "tokenizer_config.json", {k: v for k, v in config.items() if v is not None})
        save_chat_template(directory, self.chat_template)

    def _add_tokens(self, added_tokens_decoder: Any) -> None:
        """Give the backend the added tokens that it lacks, in the order of their ids, and check every id."""
        if not isinstance(added_tokens_decoder, Mapping):
            raise CheckpointError(f"added_tokens_decoder: found {added_tokens_decoder!r}; expected {{id: token}}")
        try:
            wanted = {int(index): added_token(token) for index, token in added_tokens_decoder.items()}
        except (TypeError, ValueError) as error:
            raise CheckpointError(f"added_tokens_decoder: expected {{id: token}}, {error}") from error
        special = set(self.all_special_tokens)
        # An `AddedToken` compares its flags too: a token that both files know gets the flags of the configuration.
        known = list(self._backend.get_added_tokens_decoder().values())
        missing = [token for _, token in sorted(wanted.items()) if token not in known]
        contents = {token.content for token in [*known, *missing]}
        for token in missing:
            token.special = token.special or token.content in special
        missing += [tokenizers.AddedToken(t, special=True) for t in self.all_special_tokens if t not in contents]
        self._backend.add_tokens(missing)
        found = {index: self._backend.token_to_id(token.content) for index, token in wanted.items()}
        wrong = [
            f"{wanted[index].content!r} has id {got}, expected {index}"
            for index, got in sorted(found.items())
            if got != index
        ]
        raise_faults(wrong, CheckpointError, where="added_tokens_decoder does not continue tokenizer.json", shown=3)

    def __call__(
        self,
        text: str | Sequence[str] | Sequence[Sequence[str]],
        *,
        padding: bool | str = False,
        truncation: bool | str | None = None,
        max_length: int | None = None,
        pad_to_multiple_of: int | None = None,
        padding_side: str | None = None,
        add_special_tokens: bool = True,
        is_split_into_words: bool = False,
        split_special_tokens: bool | None = None,
        return_attention_mask: bool | None = None,
        return_token_type_ids: bool | None = None,
        return_special_tokens_mask: bool = False,
        return_offsets_mapping: bool = False,
        return_length: bool = False,
        return_tensors: str | None = None,
    ) -> BatchFeature:
        """Token ids of one text or of a batch.

        Args:
          text: one text, or a list of B texts; with `is_split_into_words`, a list of words, or B such lists.
          padding: False; True or "longest" pads to the longest row; "max_length" to `max_length`.
          truncation: whether rows are cut to `max_length`. `max_length` alone, without padding, cuts too.
          max_length: in tokens; None is `model_max_length`.
          pad_to_multiple_of: padded lengths are rounded up to a multiple of this.
          padding_side: None is `self.padding_side`.
          add_special_tokens: whether the tokens that `tokenizer.json` puts around every text are added; GLM-4 has none.
          is_split_into_words: `text` is words, not texts.
          split_special_tokens: True reads special tokens in `text` as ordinary characters.
          return_attention_mask, return_token_type_ids: None is what `model_input_names` says.
          return_special_tokens_mask, return_offsets_mapping, return_length: add `special_tokens_mask`, `offset_mapping`
            (characters) and `length`.
          return_tensors: None gives lists; "np" gives arrays [B, T] int64, with B = 1 for one text.

        Returns:
          `input_ids` and what else was asked for: lists of T numbers for one text, of B such lists for a batch.

        Raises:
          MessageError: `text` is not text or not valid Unicode, an option has an unknown value, or unequal rows should
            become arrays.
        """
        check_return_tensors(return_tensors)
        batched = isinstance(text, (list, tuple)) and not (
            is_split_into_words and all(isinstance(word, str) for word in text)
        )
        rows = list(text) if batched else [text]
        check_text(rows, is_split_into_words)
        checked("max_length", max_length, Annotated[int, Meta(ge=0, lt=2**31)] | None, MessageError)
        checked("pad_to_multiple_of", pad_to_multiple_of, Size | None, MessageError)
        pad_to, truncate, limit = self._strategies(padding, truncation, max_length)
        if truncate and pad_to is not None and pad_to_multiple_of is not None and limit % pad_to_multiple_of:
            multiple = f"a multiple of pad_to_multiple_of={pad_to_multiple_of}"
            raise MessageError(f"max_length: found {limit}; expected {multiple}")

        with self._lock:
            if truncate:
                self._backend.enable_truncation(max_length=limit, direction=self.truncation_side)
            else:
                self._backend.no_truncation()
            if pad_to is None:
                self._backend.no_padding()
            else:
                self._backend.enable_padding(
                    length=limit if pad_to == "max_length" else None,
                    direction=checked("padding_side", padding_side or self.padding_side, PaddingSide, CheckpointError),
                    pad_id=self.pad_token_id,
                    pad_token=self.pad_token,
                    pad_to_multiple_of=pad_to_multiple_of,
                )
            split = self.split_special_tokens if split_special_tokens is None else split_special_tokens
            self._backend.encode_special_tokens = bool(split)
            encodings = self._backend.encode_batch(
                rows, is_pretokenized=bool(is_split_into_words), add_special_tokens=bool(add_special_tokens)
            )

        by_default = self.model_input_names
        fields: dict[str, Any] = {"input_ids": [e.ids for e in encodings]}
        if return_token_type_ids or (return_token_type_ids is None and "token_type_ids" in by_default):
            fields["token_type_ids"] = [e.type_ids for e in encodings]
        if return_attention_mask or (return_attention_mask is None and "attention_mask" in by_default):
            fields["attention_mask"] = [e.attention_mask for e in encodings]
        if return_special_tokens_mask:
            fields["special_tokens_mask"] = [e.special_tokens_mask for e in encodings]
        if return_offsets_mapping:
            fields["offset_mapping"] = [e.offsets for e in encodings]
        if return_tensors == "np":
            fields = {name: stack_rows(value, name) for name, value in fields.items()}
        elif not batched:
            fields = {name: value[0] for name, value in fields.items()}
        if return_length:
            length = [len(e.ids) for e in encodings]
            fields["length"] = np.asarray(length, np.int64) if return_tensors == "np" else length
        return BatchFeature(fields)

    def _strategies(
        self, padding: bool | str, truncation: bool | str | None, max_length: int | None
    ) -> tuple[str | None, bool, int]:
        """How to pad (None, "longest", "max_length"), whether to cut, and the length for both."""
        pad_to = padding_strategy(padding)
        if max_length is not None and padding is False and truncation is None:
            truncation = True
        if truncation not in (None, False, True, "do_not_truncate", "longest_first", "only_first"):
            expected = "a bool, 'longest_first' or 'do_not_truncate'"
            raise MessageError(f"truncation: found {truncation!r}; expected {expected}")
        truncate = truncation not in (None, False, "do_not_truncate")
        if max_length is None and self.model_max_length > _NO_LIMIT and (truncate or pad_to == "max_length"):
            warnings.warn(
                "padding or truncation to max_length, but no max_length was given and model_max_length sets none: "
                "neither is done",
                stacklevel=3,
            )
            truncate, pad_to = False, None if pad_to == "max_length" else pad_to
        if pad_to is not None and self.pad_token_id is None:
            raise MessageError("padding was asked for, but the tokenizer has no pad_token: set tokenizer.pad_token")
        return pad_to, truncate, self.model_max_length if max_length is None else max_length

    def encode(self, text: str | Sequence[str], **kwargs: Any) -> list[int]:
        """The `input_ids` of `self(text, **kwargs)`."""
        return self(text, **kwargs)["input_ids"]

    def encode_parts(self, parts: Sequence[tuple[str, bool]], *, add_special_tokens: bool = True) -> list[int]:
        """Token ids of a text in parts, each with whether special tokens in it are tokens, or ordinary characters."""
        with self._lock:
            self._backend.no_truncation()
            self._backend.no_padding()
            encodings = []
            for text, is_special in parts:
                self._backend.encode_special_tokens = not is_special
                encodings.append(self._backend.encode(text, add_special_tokens=False))
            joined = tokenizers.Encoding.merge(encodings)
            return self._backend.post_process(joined, add_special_tokens=add_special_tokens).ids

    def tokenize(self, text: str, add_special_tokens: bool = False) -> list[str]:
        """The tokens of a text, as they are spelled in the vocabulary."""
        return self.convert_ids_to_tokens(self.encode(text, add_special_tokens=add_special_tokens))

    def decode(
        self,
        token_ids: Any,
        skip_special_tokens: bool = False,
        clean_up_tokenization_spaces: bool | None = None,
    ) -> Any:
        """Text of token ids.

        Args:
          token_ids: one id, [T] ids, or [B, T] as an array or nested lists; NumPy and JAX arrays are taken.
          skip_special_tokens: leave special tokens out; `<think>` and `<answer>` are not special.
          clean_up_tokenization_spaces: None is `self.clean_up_tokenization_spaces`.

        Returns:
          A string, or a list of B strings for a batch, as in transformers 5.x (4.57.1 raises there).

        Raises:
          Glm4vError: something among `token_ids` is not an id, such as the label -100.
        """
        ids = _to_lists(token_ids)
        if isinstance(ids, int):
            ids = [ids]
        if ids and all(isinstance(row, list) for row in ids):
            return [self.decode(row, skip_special_tokens, clean_up_tokenization_spaces) for row in ids]
        for value in ids:
            if not isinstance(value, int) or value < 0:
                raise Glm4vError(f"token_ids: found {value!r}; expected integers >= 0")
        text = self._backend.decode(ids, skip_special_tokens=skip_special_tokens)
        if clean_up_tokenization_spaces is None:
            clean_up_tokenization_spaces = self.clean_up_tokenization_spaces
        if clean_up_tokenization_spaces:
            for found, put in _CLEAN_UPS:
                text = text.replace(found, put)
        return text

    def batch_decode(
        self,
        sequences: Any,
        skip_special_tokens: bool = False,
        clean_up_tokenization_spaces: bool | None = None,
    ) -> list[str]:
        """`decode` of each of `sequences`: [B, T] ids, or B sequences of any lengths."""
        return [self.decode(ids, skip_special_tokens, clean_up_tokenization_spaces) for ids in sequences]

    def convert_tokens_to_ids(self, tokens: str | Sequence[str]) -> Any:
        """The id of a token, or a list of ids; an unknown token gives `unk_token_id`, which GLM-4 does not have."""
        if not isinstance(tokens, str):
            return [self.convert_tokens_to_ids(token) for token in tokens]
        index = self._backend.token_to_id(tokens)
        return self.unk_token_id if index is None else index

    def convert_ids_to_tokens(self, ids: Any, skip_special_tokens: bool = False) -> Any:
        """The token of an id, or a list of tokens; an unknown id gives None."""
        ids = _to_lists(ids)
        if isinstance(ids, int):
            return self._backend.id_to_token(ids)
        skipped = set(self.all_special_ids) if skip_special_tokens else set()
        return [self._backend.id_to_token(index) for index in ids if index not in skipped]

    def get_vocab(self) -> dict[str, int]:
        """{token: id}, added tokens included."""
        return self._backend.get_vocab(with_added_tokens=True)

    def get_added_vocab(self) -> dict[str, int]:
        """{token: id} of the added tokens, in the order of their ids."""
        return {token.content: index for index, token in sorted(self.added_tokens_decoder.items())}

    @property
    def added_tokens_decoder(self) -> dict[int, tokenizers.AddedToken]:
        """{id: token with its flags} of the added tokens."""
        return self._backend.get_added_tokens_decoder()

    @property
    def backend_tokenizer(self) -> tokenizers.Tokenizer:
        """The wrapped `tokenizers.Tokenizer`."""
        return self._backend

    def __len__(self) -> int:
        """Number of tokens, added ones included."""
        return self._backend.get_vocab_size(with_added_tokens=True)

    def __bool__(self) -> bool:
        """Always true, in spite of `__len__`."""
        return True

    @property
    def vocab_size(self) -> int:
        """Number of tokens, added ones not counted."""
        return self._backend.get_vocab_size(with_added_tokens=False)


def _to_lists(value: Any) -> Any:
    """Integers in arrays and sequences of any depth as Python numbers and lists."""
    if isinstance(value, (list, tuple)):
        return [_to_lists(item) for item in value]
    return value.tolist() if hasattr(value, "tolist") else value
