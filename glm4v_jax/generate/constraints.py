"""What the next token must not be, or is made more or less likely by: bans, biases, least lengths.

`min_new_tokens`, `no_repeat_ngram_size`, `bad_words_ids`, `suppress_tokens` and `sequence_bias` of
`generation/logits_process.py` in transformers 4.57.1, as data of each row: rows with and without them share a program.
That program is not the ordinary one, which does nothing for them.

B: rows, V: vocabulary, S: tokens of a row, N: sequences of several tokens, L: tokens of the longest, its last left out.
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from glm4v_jax.config.generation import GenerationConfig
from glm4v_jax.devices import mesh
from glm4v_jax.errors import GenerationError
from glm4v_jax.inputs.vision_rows import bucket

_MIN_SEQUENCES, _MIN_LENGTH = 8, 4

_Add = Callable[[Array, Array, Array], Array]


class Constraints(NamedTuple):
    """Constraints of each row; what a row does not use changes nothing.

    Attributes:
      tokens: of the prompt and of the sequence so far, the newest last; -1 before the first.
      bias: added to each token's logit; -inf bans it.
      prefixes: sequences of several tokens without their last, ending at L; -1 before their first.
      lasts: their last tokens.
      biases: added to the logit of the last token where the tokens before it are the newest.
      ngram: size of the n-grams that may not come twice; 0 allows all.
      min_new: new tokens that come before any end token.
    """

    tokens: Int[Array, "B S"]
    bias: Float[Array, "B V"]
    prefixes: Int[Array, "B N L"]
    lasts: Int[Array, "B N"]
    biases: Float[Array, "B N"]
    ngram: Int[Array, " B"]
    min_new: Int[Array, " B"]


class TableShape(NamedTuple):
    """N and L of `Constraints`."""

    sequences: int = _MIN_SEQUENCES
    length: int = _MIN_LENGTH

    @classmethod
    def of(cls, configs: Mapping[int, GenerationConfig], least: "TableShape") -> "TableShape":
        """The shape, of few, that holds the sequences of any of these rows; at least `least`."""
        tables = [[tokens for tokens in config.biases if len(tokens) > 1] for config in configs.values()]
        sequences = max(map(len, tables), default=0)
        length = max((len(tokens) - 1 for table in tables for tokens in table), default=0)
        return cls(bucket(sequences, least.sequences), bucket(length, least.length))


def constraints_of(
    rows: Mapping[int, tuple[np.ndarray, GenerationConfig]], batch: int, capacity: int, vocab: int, shape: TableShape
) -> Constraints:
    """Host arrays of `batch` rows: row -> its tokens so far, and its options."""
    n, length = shape
    made = Constraints(
        tokens=np.full((batch, capacity), -1, np.int32),
        bias=np.zeros((batch, vocab), np.float32),
        prefixes=np.full((batch, n, length), -1, np.int32),
        lasts=np.zeros((batch, n), np.int32),
        biases=np.zeros((batch, n), np.float32),
        ngram=np.zeros(batch, np.int32),
        min_new=np.zeros(batch, np.int32),
    )
    largest = np.iinfo(np.int32).max
    for row, (tokens, config) in rows.items():
        made.tokens[row, capacity - len(tokens) :] = tokens
        made.ngram[row] = min(config.no_repeat_ngram_size, largest)
        made.min_new[row] = min(config.min_new_tokens, largest)
        table = 0
        for sequence, bias in config.biases.items():
            *prefix, last = sequence
            if not prefix:
                made.bias[row, last] = bias
                continue
            made.prefixes[row, table, length - len(prefix) :] = prefix
            made.lasts[row, table], made.biases[row, table] = last, bias
            table += 1
    return made


@jax.jit
def merged(rows: Bool[Array, " B"], new: Constraints, old: Constraints | None) -> Constraints:
    """`new` in these rows, `old` in the others; None for no constraints."""
    rows, new = mesh.reshard(rows, "batch"), _placed(new)
    if old is None:
        return new
    return jax.tree.map(lambda x, y: jnp.where(rows.reshape(-1, *(1,) * (x.ndim - 1)), x, y), new, old)


@functools.partial(jax.jit, static_argnames=("capacity", "shape"))
def grown(constraints: Constraints, capacity: int, shape: TableShape) -> Constraints:
    """Room for more tokens and sequences."""
    more = capacity - constraints.tokens.shape[1]
    n, length = (new - old for new, old in zip(shape, constraints.prefixes.shape[1:], strict=True))
    return constraints._replace(
        tokens=jnp.pad(constraints.tokens, ((0, 0), (more, 0)), constant_values=-1),
        prefixes=jnp.pad(constraints.prefixes, ((0, 0), (0, n), (length, 0)), constant_values=-1),
        lasts=jnp.pad(constraints.lasts, ((0, 0), (0, n))),
        biases=jnp.pad(constraints.biases, ((0, 0), (0, n))),
    )


def pushed(tokens: Int[Array, "B S"], new: Int[Array, " B"]) -> Int[Array, "B S"]:
    """`Constraints.tokens` with one more token in each row."""
    return jnp.concatenate([tokens[:, 1:], new[:, None]], axis=1)


def biased(scores: Float[Array, "B V"], constraints: Constraints) -> Float[Array, "B V"]:
    """Add the biases; the reference does so before the repetition penalty."""

    def bias(bias: Array, tokens: Array, prefixes: Array, lasts: Array, biases: Array, add_at: _Add) -> Array:
        length = prefixes.shape[-1]
        newest = jnp.pad(tokens, ((0, 0), (max(0, length - tokens.shape[1]), 0)), constant_values=-1)[:, None, -length:]
        matches = jnp.all((prefixes == -1) | (prefixes == newest), axis=-1)
        # The reference wants one token more than the prefix in the context.
        fits = jnp.sum(prefixes >= 0, axis=-1) < jnp.sum(tokens >= 0, axis=-1, keepdims=True)
        return add_at(bias, lasts, jnp.where(matches & fits, biases, 0.0))

    # Summed before they are added, as in the reference: sums of float32 depend on their order.
    rows = constraints.tokens, constraints.prefixes, constraints.lasts, constraints.biases
    return scores + _by_shard(bias, constraints.bias, *rows)


def banned(
    scores: Float[Array, "B V"], constraints: Constraints, step: Int[Array, " B"], eos: Int[Array, "B E"]
) -> Float[Array, "B V"]:
    """Set tokens to -inf that would repeat an n-gram, and end tokens `eos` while `step` is below the least length."""

    def ban(scores: Array, tokens: Array, ngram: Array, min_new: Array, step: Array, eos: Array, add_at: _Add) -> Array:
        repeats = jnp.where(_completes(tokens, ngram), -jnp.inf, 0.0)
        ends = jnp.where((step < min_new)[:, None] & (eos >= 0), -jnp.inf, 0.0)
        ids, values = (jnp.concatenate(parts, axis=1) for parts in ((tokens, eos), (repeats, ends)))
        return add_at(scores, ids, values)

    return _by_shard(ban, scores, constraints.tokens, constraints.ngram, constraints.min_new, step, eos)


def processed(
    scores: Float[Array, "B V"], tokens: Int[Array, "B S"], processors: tuple[Callable[..., Any], ...]
) -> Float[Array, "B V"]:
    """Call the user's functions; GenerationError if one returns another shape, or cannot be compiled."""

    def call(tokens: Array, scores: Array) -> Array:
        for processor in processors:
            try:
                new = processor(tokens, scores)
            except jax.errors.JAXTypeError as error:
                raise GenerationError(
                    f"logits_processor: found {processor!r}, which needs the numbers while it is compiled; expected "
                    "jax.numpy and jnp.where, and neither NumPy nor Python's if"
                ) from error
            shape = getattr(new, "shape", None)
            if shape != scores.shape:
                found = type(new).__name__ if shape is None else f"scores {list(shape)}"
                raise GenerationError(
                    f"logits_processor: found {found}; expected scores {list(scores.shape)}, as they were"
                )
            scores = jnp.asarray(new, scores.dtype)
        return scores

    if not processors:
        return scores
    # Replicated: a function need not know of meshes.
    replicated = [mesh.reshard(x, None, None) for x in (tokens, scores)]
    scores = jax.shard_map(call, in_specs=(jax.P(), jax.P()), out_specs=jax.P(), check_vma=False)(*replicated)
    return mesh.reshard(scores, "batch", "vocab")


def _placed(constraints: Constraints) -> Constraints:
    """Shard over the batch, and the bias over the vocabulary."""
    return Constraints(*map(_of_rows, constraints))._replace(
        bias=mesh.reshard(jnp.asarray(constraints.bias), "batch", "vocab")
    )


def _of_rows(x: Array) -> Array:
    """Shard over the batch alone."""
    return mesh.reshard(jnp.asarray(x), "batch", *(None,) * (jnp.ndim(x) - 1))


def _completes(tokens: Int[Array, "B S"], ngram: Int[Array, " B"]) -> Bool[Array, "B S"]:
    """Whether a token ends an n-gram that begins with the newest n - 1 tokens."""
    size = tokens.shape[1]
    n = jnp.minimum(ngram, size + 1)[:, None]
    begin = size - jnp.sum(tokens >= 0, axis=1, keepdims=True)
    found = (n > 0) & (jnp.arange(size) >= begin + n - 1)

    def compare(k: Array, found: Array) -> Array:
        newest = jax.lax.dynamic_slice_in_dim(tokens, size - k, 1, axis=1)
        return found & ((k >= n) | (jnp.roll(tokens, k, axis=1) == newest))

    return jax.lax.fori_loop(1, jnp.max(n), compare, found)


def _by_shard(function: Callable[..., Array], scores: Float[Array, "B V"], *rows: Array) -> Float[Array, "B V"]:
    """Call `function(scores, *rows, add_at)` on each shard of the vocabulary.

    `add_at(scores, ids [B, M], values [B, M])` adds to the scores of these tokens, which may come several times;
    negative ids are none.
    """
    spec = mesh.spec("batch", "vocab")
    names = mesh.names_of(spec[1])

    def local(scores: Array, *rows: Array) -> Array:
        width = scores.shape[1]
        offset = jax.lax.axis_index(names) * width if names else 0

        def add_at(scores: Array, ids: Array, values: Array) -> Array:
            ids = ids - offset
            ids = jnp.where((ids >= 0) & (ids < width), ids, width)
            return jax.vmap(lambda row, ids, values: row.at[ids].add(values, mode="drop"))(scores, ids, values)

        return function(scores, *rows, add_at)

    scores = mesh.reshard(scores, "batch", "vocab")
    rows = tuple(_of_rows(x) for x in rows)
    specs = (spec, *map(mesh.spec_of, rows))
    return jax.shard_map(local, in_specs=specs, out_specs=spec, check_vma=False)(scores, *rows)
