"""Options of a generation: names, defaults and precedence of `transformers.GenerationConfig` 4.57.1.

Options of the reference that are not built (contrastive search, watermarks, ...) are refused by name instead of being
ignored.
"""

import dataclasses
import math
import typing
from collections.abc import Callable, Hashable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, Self

import numpy as np
import numpy.typing as npt
from msgspec import Meta

from glm4v_jax.config.checks import Natural, Positive, Seed, did_you_mean, fault, validate
from glm4v_jax.config.grammar import KINDS, Grammar, grammar_of, schema_text
from glm4v_jax.errors import CheckpointError, GenerationError, counted, naming
from glm4v_jax.files import assets_directory, read_json_object

# `max_length` of the reference when nobody sets it; it then counts *new* tokens (`_prepare_generated_length`).
_DEFAULT_NEW_TOKENS = 20

MAX_LOGPROBS = 64

# Below this, dividing a float32 logit can overflow to infinity, and two infinities have no softmax.
_SMALLEST_DIVISOR = 1e-30
_LARGEST = float(np.finfo(np.float32).max)

# Options of the reference that are not built, with the values at which they have no effect (None always has none).
_UNSUPPORTED: dict[str, tuple[Any, ...]] = {
    "assistant_early_exit": (),
    "assistant_model": (),
    "begin_suppress_tokens": (),
    "constraints": (),
    "diversity_penalty": (0.0,),
    "dola_layers": (),
    "encoder_no_repeat_ngram_size": (0,),
    "encoder_repetition_penalty": (1.0,),
    "epsilon_cutoff": (0.0,),
    "eta_cutoff": (0.0,),
    "exponential_decay_length_penalty": (),
    "force_words_ids": (),
    "forced_bos_token_id": (),
    "forced_eos_token_id": (),
    "guidance_scale": (1.0,),
    "max_time": (),
    "min_length": (0,),
    "negative_prompt_ids": (),
    "num_beam_groups": (1,),
    "output_attentions": (False,),
    "output_hidden_states": (False,),
    "penalty_alpha": (0.0,),
    "prefix_allowed_tokens_fn": (),
    "remove_invalid_values": (False,),
    "renormalize_logits": (False,),
    "stopping_criteria": ([],),
    "synced_gpus": (False,),
    "token_healing": (False,),
    "typical_p": (1.0,),
    "watermarking_config": (),
}

Token = Annotated[int, Meta(ge=0, lt=2**31)]
Tokens = Annotated[tuple[Token, ...], Meta(min_length=1)]

# One of them may stand for itself, and None for nothing.
_LISTS = (
    "eos_token_id", "stop_strings", "bad_words_ids", "suppress_tokens", "sequence_bias", "logits_processor", "choices",
)  # fmt: skip

OF_THE_MODEL = ("return_dict_in_generate", "output_scores", "output_logits")
"""Options that only `Glm4vForConditionalGeneration.generate` has."""
OF_BEAMS = ("num_beams", "length_penalty", "early_stopping")
"""Options of beam search, which only `Glm4vForConditionalGeneration.generate` has too."""
OF_ALL_REQUESTS = ("logprobs", "logprobs_of", "logits_processor", "prompt_lookup_num_tokens")
"""Options that all requests of one batch share: each is a set of programs."""

# What a configuration of the reference has besides options, or has no effect without one of the above.
_NOT_OPTIONS = frozenset(
    {
        "transformers_version", "_from_model_config", "_commit_hash", "bos_token_id", "decoder_start_token_id",
        "num_assistant_tokens", "num_assistant_tokens_schedule",
        "assistant_confidence_threshold", "max_matching_ngram_size", "assistant_lookbehind", "target_lookbehind",
        "is_assistant", "cache_implementation", "cache_config", "return_legacy_cache",
        "prefill_chunk_size", "compile_config", "disable_compile", "generation_kwargs", "low_memory",
    }
)  # fmt: skip


class SamplingParams(NamedTuple):
    """The options that sampling a token reads: scalars, or arrays `[B]` with one value per row.

    They are inputs of a compiled program and not part of it: changing one never recompiles.
    """

    do_sample: npt.ArrayLike
    """bool; False takes the most likely token after the repetition penalty and ignores the other options."""
    temperature: npt.ArrayLike
    """float32 > 0; 1 is off."""
    top_k: npt.ArrayLike
    """int32 >= 0; 0 is off."""
    top_p: npt.ArrayLike
    """float32 in (0, 1]; 1 is off."""
    min_p: npt.ArrayLike
    """float32 in [0, 1]; 0 is off."""
    repetition_penalty: npt.ArrayLike
    """float32 > 0; 1 is off."""

    @classmethod
    def of(cls, config: "GenerationConfig", batch: int) -> "SamplingParams":
        """Make host arrays `[batch]` with the options of `config` in every row."""
        values = zip(config.sampling, SAMPLING_DTYPES, strict=True)
        return cls(*(np.full(batch, value, dtype) for value, dtype in values))


SAMPLING_DTYPES = (np.bool_, np.float32, np.int32, np.float32, np.float32, np.float32)
"""Of the fields of `SamplingParams`."""


@dataclasses.dataclass(frozen=True)
class GenerationConfig:
    """Options of one generation, checked on construction.

    >>> config = GenerationConfig(do_sample=True, temperature=0.8, top_k=2, eos_token_id=7)
    >>> config.replace(max_new_tokens=64).new_tokens(prompt_length=100)
    64

    Fields keep the reference's names and defaults, `top_k` 50 among them. `max_length` None stands for the
    reference's untouched default of 20, which counts new tokens; a number counts prompt and new tokens together.
    `eos_token_id` takes one id, several, or -1 (or nothing) to never stop; it is stored as a tuple. `seed` is this
    package's: equal seeds sample equal tokens.

    `min_new_tokens` tokens come before any end token; no `no_repeat_ngram_size` successive tokens come twice, the
    prompt's included; sequences in `bad_words_ids` and tokens in `suppress_tokens` never come. `sequence_bias` is added
    to the logit of the token that completes a sequence: {(5, 6): -2.0} or [[[5, 6], -2.0]]. `logits_processor`: a JAX
    function (tokens [B, S], scores [B, V]) -> scores, or several; the newest token is the last of its row, and -1
    stands before the prompt's first. Each function is compiled once: pass the same object again.

    `num_beams` above 1 searches for the likeliest sequences of a prompt, and returns `num_return_sequences` of them; a
    sequence counts by the sum of its log probabilities divided by its length ** `length_penalty`. `early_stopping`
    says when to stop after `num_beams` sequences have ended: at once (True), when better ones seem unlikely (False), or
    are impossible ("never").

    `prompt_lookup_num_tokens` drafts up to this many tokens, at most 7, from what the prompt and the answer hold
    already, and keeps those that would be chosen anyway: the same tokens in fewer decode steps, where an answer copies.

    `return_dict_in_generate`, with `output_scores` and `output_logits`, is for `model.generate` alone.

    `stop_strings` end the text. The others are for `Engine` alone. After `think_budget` tokens thinking that is still
    open is closed, and up to `answer_budget` more tokens follow (`max_new_tokens` by default, which then limits nothing
    else); 0 disables thinking. `stop_repetition` ends a text that repeats itself. `logprobs` returns log
    probabilities of the sampled tokens and of the n likeliest: those of the model, or with `logprobs_of="sampling"` of
    the distribution that tokens are drawn from, after penalties, bans, temperature and cuts.

    `json_schema` (a mapping or its JSON text; {} for any JSON object), `regex` or `choices` restrict the answer, which
    comes after the thought: `Completion.answer` is exactly such a text. At most one of them is given. They need the
    `grammar` extra.

    Raises:
        GenerationError: an option is out of its range; the message names it, its value and what was expected.
    """

    max_new_tokens: Positive | None = None
    max_length: Positive | None = None
    do_sample: bool = False
    temperature: Annotated[float, Meta(ge=0, le=_LARGEST, description="a finite number of at least 0")] = 1.0
    top_k: Annotated[int, Meta(ge=0, description="an integer of at least 0 (0 switches it off)")] = 50
    top_p: Annotated[float, Meta(gt=0, le=1, description="a number above 0 and at most 1 (1 switches it off)")] = 1.0
    min_p: Annotated[float, Meta(ge=0, le=1, description="a number from 0 to 1 (0 switches it off)")] = 0.0
    repetition_penalty: Annotated[
        float,
        Meta(ge=_SMALLEST_DIVISOR, le=_LARGEST, description=f"a finite number of at least {_SMALLEST_DIVISOR}"),
    ] = 1.0
    min_new_tokens: Natural = 0
    no_repeat_ngram_size: Natural = 0
    bad_words_ids: Annotated[
        tuple[Tokens, ...], Meta(description="a list of lists of at least one token id, each at least 0")
    ] = ()
    suppress_tokens: tuple[Token, ...] = ()
    sequence_bias: Annotated[
        tuple[tuple[Tokens, float], ...],
        Meta(
            extra={"finite": False},
            description="a number for each list of token ids, as {(5, 6): -2.0} or [[[5, 6], -2.0]]",
        ),
    ] = ()
    # Not in the repr, which processes compare: a function's holds an address.
    logits_processor: tuple[Any, ...] = dataclasses.field(default=(), repr=False)
    return_dict_in_generate: bool = False
    output_scores: bool = False
    output_logits: bool = False
    num_return_sequences: Positive = 1
    num_beams: Positive = 1
    length_penalty: float = 1.0
    early_stopping: Annotated[bool | Literal["never"], Meta(description="true, false or 'never'")] = False
    eos_token_id: tuple[Annotated[int, Meta(ge=-1, lt=2**31)], ...] = ()
    pad_token_id: Natural | None = None
    prompt_lookup_num_tokens: Positive | None = None
    seed: Seed = 0
    use_cache: bool = True
    stop_strings: Annotated[
        tuple[Annotated[str, Meta(min_length=1)], ...], Meta(description="a string or several, none of them empty")
    ] = ()
    think_budget: Natural | None = None
    answer_budget: Positive | None = None
    stop_repetition: bool = False
    logprobs: Annotated[int, Meta(ge=0, le=MAX_LOGPROBS)] | None = None
    logprobs_of: Literal["model", "sampling"] = "model"
    json_schema: Annotated[str, Meta(description="a JSON schema: a mapping, or its JSON text")] | None = None
    regex: Annotated[str, Meta(min_length=1, description="a regular expression, not an empty one")] | None = None
    choices: (
        Annotated[
            tuple[Annotated[str, Meta(min_length=1)], ...],
            Meta(min_length=1, description="at least one string, none of them empty"),
        ]
        | None
    ) = None

    def __post_init__(self) -> None:
        for name in _LISTS:
            value = getattr(self, name)
            # A list of transformers' can be called too.
            is_one = isinstance(value, int | str | np.integer | Callable) and not isinstance(value, list)
            if is_one or (value is None and name != "choices"):
                object.__setattr__(self, name, () if value is None else (value,))
        object.__setattr__(self, "json_schema", schema_text(self.json_schema))
        if isinstance(self.sequence_bias, Mapping):
            object.__setattr__(self, "sequence_bias", tuple(self.sequence_bias.items()))
        validate(self, GenerationError)
        for _, bias in self.sequence_bias:
            expected = f"numbers from {-_LARGEST:g} to {_LARGEST:g}; -inf bans a sequence"
            _require(bias == -math.inf or abs(bias) <= _LARGEST, "sequence_bias", bias, expected)
        for processor in self.logits_processor:
            usable = callable(processor) and isinstance(processor, Hashable)
            usable = usable and not type(processor).__module__.startswith("transformers.")
            expected = "a hashable JAX function (tokens, scores) -> scores, or several"
            _require(usable, "logits_processor", processor, expected)
        # -1 is not a token: it never stops a row.
        object.__setattr__(self, "eos_token_id", tuple(token for token in self.eos_token_id if token != -1))
        self._check_grammar()
        budgeted = self.answer_budget is None or self.think_budget is not None
        _require(budgeted, "answer_budget", self.answer_budget, "think_budget beside it")
        if self.do_sample:
            expected = f"a finite number of at least {_SMALLEST_DIVISOR}; for greedy decoding set do_sample=False"
            _require(self.temperature >= _SMALLEST_DIVISOR, "temperature", self.temperature, expected)
            beams = "1 with do_sample=True: beam sampling is not supported; for beam search set do_sample=False"
            _require(self.num_beams == 1, "num_beams", self.num_beams, beams)
        elif self.num_beams > 1:
            count, expected = self.num_return_sequences, f"at most num_beams={self.num_beams}"
            _require(count <= self.num_beams, "num_return_sequences", count, expected)
            draft = self.prompt_lookup_num_tokens
            _require(draft is None, "prompt_lookup_num_tokens", draft, "nothing beside num_beams")
            _require(not self.stop_strings, "stop_strings", self.stop_strings, "none beside num_beams")
        else:
            count = self.num_return_sequences
            _require(
                count == 1,
                "num_return_sequences",
                count,
                "1 without do_sample=True or num_beams: greedy sequences are equal",
            )

    def _check_grammar(self) -> None:
        kinds = [kind for kind in KINDS if getattr(self, kind) is not None]
        if not kinds:
            return
        if len(kinds) > 1:
            raise GenerationError(f"{kinds[0]}: found beside {kinds[1]}; expected one of {', '.join(KINDS)}")
        _require(self.num_beams == 1, "num_beams", self.num_beams, f"1 beside {kinds[0]}")
        draft = self.prompt_lookup_num_tokens
        _require(draft is None, "prompt_lookup_num_tokens", draft, f"nothing beside {kinds[0]}")
        _ = self.grammar  # raises where it is invalid

    @property
    def grammar(self) -> Grammar | None:
        """What `json_schema`, `regex` or `choices` restrict the answer to."""
        given = ((kind, getattr(self, kind)) for kind in KINDS)
        return next((grammar_of(kind, value) for kind, value in given if value is not None), None)

    @classmethod
    def from_pretrained(cls, directory: str | Path) -> Self:
        """Read `generation_config.json` of a checkpoint directory.

        Without that file, token ids and other options are those in `config.json`, its text part included, and the
        defaults otherwise, as in the reference.

        Raises:
            CheckpointError: not a directory, or a file in it is malformed or asks for something impossible.
        """
        directory = assets_directory(directory)
        if not directory.is_dir():
            raise CheckpointError(f"{directory}: found no directory; expected that of a checkpoint")
        path = directory / "generation_config.json"
        if path.is_file():
            options = read_json_object(path)
        else:
            path = directory / "config.json"
            model = read_json_object(path) if path.is_file() else {}
            text = model.get("text_config")
            options = (_given(text) if isinstance(text, dict) else {}) | _given(model)
        with naming(path, CheckpointError):
            return cls.from_dict(options)

    @classmethod
    def from_dict(cls, options: dict[str, Any]) -> Self:
        """Make a configuration from the reference's JSON object; other keys are ignored.

        A null switches an option off, as in the reference, which for `top_k` differs from leaving it out.

        Raises:
            GenerationError: an option is out of its range, or one that is not supported is in use.
        """
        return cls(**_fields_in(options))

    def overridden(self, given: Any) -> Self:
        """Take the configuration that a call was given: `transformers.GenerationConfig`, this class, or a mapping.

        As in the reference, what an object of transformers leaves at its default is this configuration's; one of this
        class replaces it; None is this one.

        Raises:
            GenerationError: it is something else, or an option in it is unknown, not supported or out of its range.
        """
        if given is None or isinstance(given, GenerationConfig):
            return self if given is None else typing.cast(Self, given)
        # Not by its class: transformers is not imported.
        of_transformers = getattr(given, "to_diff_dict", None)
        options = of_transformers() if callable(of_transformers) else given
        if not isinstance(options, Mapping):
            expected = "a GenerationConfig, of glm4v_jax or of transformers"
            raise GenerationError(fault("generation_config", given, expected))
        known = {field.name for field in dataclasses.fields(self)} | _UNSUPPORTED.keys()
        self.replace(**{name: None for name in options if name not in known | _NOT_OPTIONS})  # refuses unknown ones
        seed = {"seed": options["seed"]} if "seed" in options else {}
        return dataclasses.replace(self, **_fields_in(options), **seed)

    def replace(self, **overrides: Any) -> Self:
        """Copy with the given options changed; None means "not given". One grammar takes the place of another.

        Raises:
            GenerationError: an option is unknown, not supported, or out of its range.
        """
        _refuse_unsupported(overrides)
        known = {field.name for field in dataclasses.fields(self)}
        if unknown := sorted(overrides.keys() - known - _UNSUPPORTED.keys()):
            found = ", ".join(map(repr, unknown))
            expected = f"{', '.join(sorted(known))}{did_you_mean(unknown[0], known)}"
            raise GenerationError(f"generation options: found unknown {found}; expected some of {expected}")
        given = {k: v for k, v in overrides.items() if v is not None and k in known}
        others: dict[str, Any] = dict.fromkeys(KINDS) if given.keys() & set(KINDS) else {}
        return dataclasses.replace(self, **others | given)

    def changed(self) -> dict[str, Any]:
        """Return the options that are not at their defaults, as generation_config.json has them; no functions.

        >>> GenerationConfig(top_k=2, eos_token_id=(3, 5), seed=7).changed()
        {'top_k': 2, 'eos_token_id': [3, 5]}
        """
        found = {field.name: (getattr(self, field.name), field.default) for field in dataclasses.fields(self)}
        return {
            name: list(value) if isinstance(value, tuple) else value
            for name, (value, default) in found.items()
            if value != default and name not in ("seed", "logits_processor")
        }

    def new_tokens(self, prompt_length: int, max_position_embeddings: int | None = None) -> int:
        """Compute the most tokens to generate after a (padded) prompt of `prompt_length` tokens.

        `max_new_tokens` wins over `max_length`. The default of 20 shrinks to what `max_position_embeddings` leaves.

        Raises:
            GenerationError: nothing can be generated within `max_length`, or not everything within
                `max_position_embeddings`.
        """
        if self.max_new_tokens is not None:
            count, field, value = self.max_new_tokens, "max_new_tokens", self.max_new_tokens
        elif self.max_length is not None:
            count, field, value = self.max_length - prompt_length, "max_length", self.max_length
            _require(count >= 1, field, value, f"more than the {counted(prompt_length, 'token')} of the prompt")
        else:
            room = _DEFAULT_NEW_TOKENS if max_position_embeddings is None else max_position_embeddings - prompt_length
            count, field, value = max(1, min(_DEFAULT_NEW_TOKENS, room)), "max_new_tokens", None
        if max_position_embeddings is not None and prompt_length + count > max_position_embeddings:
            raise GenerationError(
                f"{field}: found {value!r} with a prompt of {counted(prompt_length, 'token')}; expected the prompt and "
                f"at least {counted(count, 'new token')} to fit max_position_embeddings={max_position_embeddings:,}"
            )
        return count

    @property
    def is_constrained(self) -> bool:
        """Whether scores depend on more than the logits, `sampling` and which tokens have occurred."""
        bans = self.bad_words_ids or self.suppress_tokens or self.sequence_bias or self.no_repeat_ngram_size
        return bool(bans or self.logits_processor or (self.min_new_tokens and self.eos_token_id))

    @property
    def biases(self) -> dict[tuple[int, ...], float]:
        """Sequences of tokens, and what is added to the logit of the token that completes them; -inf for a ban."""
        # A ban may be added like a bias: nothing that follows makes more of -inf.
        ends = {(token,) for token in self.eos_token_id}
        bans = [sequence for sequence in self.bad_words_ids if sequence not in ends]
        bans += [(token,) for token in self.suppress_tokens]
        return dict(self.sequence_bias) | dict.fromkeys(bans, -math.inf)

    def check_vocabulary(self, vocab_size: int) -> None:
        """Check token ids against a model's vocabulary.

        Raises:
            GenerationError: a banned or biased token is not one of it.
        """
        sequences = [*self.bad_words_ids, self.suppress_tokens, *(tokens for tokens, _ in self.sequence_bias)]
        highest = max((max(tokens) for tokens in sequences if tokens), default=0)
        names = "bad_words_ids, suppress_tokens or sequence_bias"
        _require(highest < vocab_size, names, highest, f"tokens below {vocab_size}, the size of the vocabulary")

    @property
    def padding_id(self) -> int:
        """The id that pads finished rows: `pad_token_id`, else the first end id as in the reference, else 0."""
        if self.pad_token_id is not None:
            return self.pad_token_id
        return self.eos_token_id[0] if self.eos_token_id else 0

    @property
    def sampling(self) -> SamplingParams:
        """The options that sampling a token reads, as scalars."""
        return SamplingParams(
            do_sample=self.do_sample,
            temperature=self.temperature,
            top_k=min(self.top_k, np.iinfo(np.int32).max),
            top_p=self.top_p,
            min_p=self.min_p,
            repetition_penalty=self.repetition_penalty,
        )


def _require(condition: bool, field: str, value: Any, expected: str) -> None:
    if not condition:
        raise GenerationError(fault(field, value, expected))


def _refuse_unsupported(options: Mapping[str, Any]) -> None:
    for name in sorted(options.keys() & _UNSUPPORTED.keys()):
        value, neutral = options[name], _UNSUPPORTED[name]
        if value is not None and value not in neutral:
            expected = " or ".join(repr(choice) for choice in neutral) or "nothing"
            raise GenerationError(f"{name}: found {value!r}; expected {expected}, because this option is not supported")


def _fields_in(options: Mapping[str, Any]) -> dict[str, Any]:
    """The fields in a configuration of the reference; a null switches an option off."""
    _refuse_unsupported(options)
    fields: dict[str, Any] = {}
    for field in dataclasses.fields(GenerationConfig):
        if field.name in options and field.name != "seed":
            value = options[field.name]
            off = 0 if field.name == "top_k" else field.default
            fields[field.name] = off if value is None else value
    if fields.get("max_length") == _DEFAULT_NEW_TOKENS:
        del fields["max_length"]  # the reference takes a 20 in the file for its default
    return fields


def _given(options: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in options.items() if value is not None}
