"""Options of generation through both models: bans, biases, functions, stop strings, prompt lookup, beams."""

import dataclasses
import functools
import types
from collections.abc import Iterator, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from tests.reference import to_torch

MAX_LOGIT_DIFFERENCE = 1e-5
NEW_TOKENS = 64

Arrays = dict[str, np.ndarray]


@dataclasses.dataclass
class OptionLine:
    """One option of generation through both models."""

    case: str
    tokens_equal: int
    tokens: int
    differs: bool
    """from greedy tokens without the option"""
    score_difference: float
    """largest of what tokens were chosen from, relative as above; infinite where other tokens are ruled out; of beams,
    of the scores of sequences"""
    logit_difference: float
    """0 for beams, which return none"""

    @property
    def passed(self) -> bool:
        """Whether everything agrees, and the option did something."""
        return (
            self.differs
            and self.tokens_equal == self.tokens
            and self.score_difference <= MAX_LOGIT_DIFFERENCE
            and self.logit_difference <= MAX_LOGIT_DIFFERENCE
        )


def scenarios(row: list[int], tokenizers: tuple[Any, Any]) -> Iterator[tuple[str, dict[str, Any], dict[str, Any]]]:
    """Name, and options for (the reference, this package), given greedy tokens without options."""
    import torch

    def same(name: str, **options: Any) -> tuple[str, dict[str, Any], dict[str, Any]]:
        return name, options, options

    yield same("min_new_tokens, two end tokens", min_new_tokens=20, eos_token_id=[row[2], row[9]])
    for size in (1, 2, 3):
        yield same(f"no_repeat_ngram_size={size}", no_repeat_ngram_size=size)
    yield same("bad_words_ids", bad_words_ids=[[row[0]], row[3:5], row[8:11]])
    yield same("suppress_tokens", suppress_tokens=sorted(set(row[:8])))
    yield same("sequence_bias", sequence_bias={(row[1],): -4.0, tuple(row[5:8]): -6.0, (row[12], row[3]): 2.5})
    yield same(
        "all of them, repetition_penalty", min_new_tokens=20, eos_token_id=[row[2]], no_repeat_ngram_size=3,
        bad_words_ids=[row[3:5]], suppress_tokens=[row[0]], sequence_bias={(row[1],): -1.0}, repetition_penalty=1.1,
    )  # fmt: skip
    yield same("do_sample, top_k=1, no_repeat_ngram_size=2", do_sample=True, top_k=1, no_repeat_ngram_size=2)
    yield same("num_return_sequences=3, top_k=1", do_sample=True, top_k=1, num_return_sequences=3)
    # A penalty below 1 makes the answer copy. The reference wants an end token, and stumbles over image tokens in its
    # first draft.
    image, unused = tokenizers[1].convert_tokens_to_ids("<|image|>"), min({*range(len(row) + 1)} - {*row})
    yield same(
        "prompt_lookup_num_tokens=7, repetition_penalty=0.9", prompt_lookup_num_tokens=7, repetition_penalty=0.9,
        suppress_tokens=[image], eos_token_id=[unused],
    )  # fmt: skip

    def alternate_in_torch(tokens: Any, scores: Any) -> Any:
        return torch.where(torch.arange(scores.shape[1]) % 2 == tokens[:, -1:] % 2, -torch.inf, scores)

    name = "logits_processor"
    yield name, {name: [alternate_in_torch]}, {name: _alternate}
    end = next(text for text in map(tokenizers[1].decode, ([token] for token in row[5:])) if "\ufffd" not in text)
    theirs, ours = ({"stop_strings": ["never", end], "tokenizer": tokenizer} for tokenizer in tokenizers)
    yield "stop_strings", theirs, ours


def beam_scenarios(ends: list[int]) -> Iterator[dict[str, Any]]:
    """Options of beam search, given tokens that end beams at several lengths."""
    beams = {"num_beams": 4, "num_return_sequences": 4, "eos_token_id": ends}
    yield beams
    yield beams | {"length_penalty": 2.0}
    yield beams | {"length_penalty": -1.0, "num_return_sequences": 2}
    yield beams | {"early_stopping": True}
    yield beams | {"early_stopping": "never"}
    yield beams | {"min_new_tokens": 20, "no_repeat_ngram_size": 2, "repetition_penalty": 1.2}
    yield beams | {"num_beams": 9, "eos_token_id": ends[:1]}


def _alternate(tokens: Any, scores: Any) -> Any:
    """Tokens whose parity is not that of the one before."""
    return jnp.where(jnp.arange(scores.shape[1]) % 2 == tokens[:, -1:] % 2, -jnp.inf, scores)


def compare_options(
    models: tuple[Any, Any], inputs: Arrays, tokenizers: tuple[Any, Any], *, new_tokens: int = NEW_TOKENS
) -> Iterator[OptionLine]:
    """Each scenario with one prompt through both models, (the reference's, this package's)."""
    import torch

    theirs, ours = models
    length, base = inputs["input_ids"].shape[1], dict(max_new_tokens=new_tokens, do_sample=False)
    whole = dict(return_dict_in_generate=True, output_scores=True, output_logits=True)
    plain = ours.generate(**inputs, eos_token_id=-1, pad_token_id=0, **base)[0, length:].tolist()
    for name, their_options, our_options in scenarios(plain, tokenizers):
        theirs.model.rope_deltas = None
        with torch.no_grad():
            expected = theirs.generate(**to_torch(inputs), **whole, **{**base, **their_options})
        received: list[Any] = []
        found = ours.generate(
            **inputs, **whole, **{**base, "eos_token_id": -1, "pad_token_id": 0, **our_options},
            streamer=types.SimpleNamespace(put=received.append, end=functools.partial(received.append, None)),
        )  # fmt: skip
        sequences = expected.sequences.numpy()
        ids, new = found.sequences, sequences[:, length:]
        streamed = received[-1] is None and np.array_equal(np.stack(received[1:-1], axis=1), ids[:, length:])
        equal = int((ids[:, length:] == new).sum()) if streamed and ids.shape == sequences.shape else 0
        yield OptionLine(
            case=name,
            tokens_equal=equal,
            tokens=new.size,
            differs=len(new) > 1 or new[0].tolist() != plain,
            score_difference=_difference(found.scores, expected.scores),
            logit_difference=_difference(found.logits, expected.logits),
        )


def compare_beams(models: tuple[Any, Any], inputs: Arrays, *, new_tokens: int = NEW_TOKENS) -> Iterator[OptionLine]:
    """Beam search from all prompts through both models, (the reference's, this package's)."""
    import torch

    theirs, ours = models
    length, base = inputs["input_ids"].shape[1], dict(max_new_tokens=new_tokens, do_sample=False, pad_token_id=0)
    whole = dict(return_dict_in_generate=True, output_scores=True)
    plain = ours.generate(**inputs, eos_token_id=-1, **base)[:, length:]
    ends = [int(plain[i % len(plain), place]) for i, place in enumerate((new_tokens // 4, new_tokens // 2))]
    for options in beam_scenarios(ends):
        theirs.model.rope_deltas = None
        with torch.no_grad():
            expected = theirs.generate(**to_torch(inputs), **base, **whole, **options)
        found = ours.generate(**inputs, **base, **whole, **options)
        sequences, scores = expected.sequences.numpy(), expected.sequences_scores.numpy()
        same = found.sequences.shape == sequences.shape
        same = same and np.array_equal(found.beam_indices, expected.beam_indices.numpy())
        yield OptionLine(
            case=", ".join(f"{name}={value}" for name, value in options.items() if name != "eos_token_id"),
            tokens_equal=int((found.sequences == sequences)[:, length:].sum()) if same else 0,
            tokens=sequences[:, length:].size,
            differs=not np.array_equal(sequences[:: options["num_return_sequences"], length:], plain),
            score_difference=float(np.abs(found.sequences_scores - scores).max() / np.abs(scores).max()),
            logit_difference=0.0,
        )


def _difference(found: Sequence[np.ndarray], expected: Sequence[Any]) -> float:
    """Largest difference relative to the largest magnitude; infinite where infinities or numbers of steps differ."""
    theirs = np.stack([step.numpy() for step in expected])
    ours = np.stack(found)
    if ours.shape != theirs.shape or not np.array_equal(np.isfinite(ours), np.isfinite(theirs)):
        return float("inf")
    ours, theirs = (np.where(np.isfinite(x), x, 0) for x in (ours, theirs))
    return float(np.abs(ours - theirs).max() / np.abs(theirs).max())
