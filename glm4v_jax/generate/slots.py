"""Slots: B rows of a batch on the device, each free or running one sequence.

Tokens in, tokens out; nothing here knows of text. Shapes come from small sets (prefill chunks, cache capacities), so
that a warm engine compiles nothing.
"""

import dataclasses
import itertools
from collections.abc import Iterable, Mapping, Sequence

import jax
import numpy as np

from glm4v_jax.config.checks import CacheDtype, checked
from glm4v_jax.devices import stored_programs
from glm4v_jax.devices.distributed import to_host
from glm4v_jax.devices.mesh import data_shards, round_up
from glm4v_jax.errors import GenerationError
from glm4v_jax.generate import device_steps, prompt_lookup
from glm4v_jax.generate.constraints import Constraints, TableShape, constraints_of, grown, merged
from glm4v_jax.generate.device_steps import Chosen, Decoded, RowState, SlotsState, Variant
from glm4v_jax.generate.feature_pool import FeaturePool
from glm4v_jax.generate.prefill_chunks import CHUNK, ChunkBounds, Start, chunk_arrays, chunk_bounds
from glm4v_jax.generate.prefix_reuse import Prefix, RowContents
from glm4v_jax.generate.token_masks import TokenMasks, Turn, masks_of
from glm4v_jax.inputs.make_batch import MIN_LENGTH
from glm4v_jax.inputs.medium import Medium
from glm4v_jax.inputs.vision_rows import bucket
from glm4v_jax.model import kv_cache
from glm4v_jax.model.runtime import Runtime

MIN_CAPACITY = 64
MIN_EOS = 16
MAX_STEPS = 32
"""Decode steps of a dispatch at most."""
SCORED_STEPS = 8
"""The same where scores or logits of the whole vocabulary are returned: 5 MB of each row of the 9B."""


@dataclasses.dataclass
class Stats:
    """Counts of work; the utilisation of slots, or tokens a decode step, is busy_steps / slot_steps."""

    prompt_tokens: int = 0
    prefill_tokens: int = 0
    """those of them that were not in the cache"""
    reused_tokens: int = 0
    """those of them that a row held of another prompt"""
    dispatches: int = 0
    slot_steps: int = 0
    """decode steps times rows"""
    busy_steps: int = 0
    """tokens that these generated: at most one each, more with prompt lookup"""


def check_cache_dtype(name: str) -> CacheDtype:
    """Return the option `cache_dtype` after a check.

    Raises:
      GenerationError: there is no such data type.
    """
    return checked("cache_dtype", name, CacheDtype, GenerationError)


@dataclasses.dataclass
class _Prefilling:
    """A row whose prompt is being prefilled: how many of its tokens are in the cache, None before its first chunk."""

    start: Start
    prefix: Prefix
    done: int | None = None


class Slots:
    """B rows of a model.

    Attributes:
      num_rows: B.
      shards: number of shards of the batch.
      variant: of the programs that choose tokens; `top` may be changed at any time, the rest while all rows are free.
      prefilling: the rows that are being prefilled, in their order.
      reused: row -> tokens of its prompt that it took from what a row held of another.
      reuses: whether rows keep what others can use.
    """

    def __init__(
        self,
        runtime: Runtime,
        num_rows: int = 1,
        capacity: int = MIN_CAPACITY,
        *,
        pool: FeaturePool | None = None,
        variant: Variant | None = None,
        stats: Stats | None = None,
        cache_dtype: CacheDtype = "auto",
        reuse_prefixes: bool = True,
    ):
        """Create free rows.

        Args:
          runtime: the model.
          num_rows: B; rounded up to the shards of a batch.
          capacity: cache slots of a row at first; grows with what prompts need.
          pool: where vision tokens are kept; one of its own by default.
          variant: of the programs that choose tokens; by default they return tokens alone.
          stats: where to count.
          cache_dtype: of keys and values.
          reuse_prefixes: keep and copy what rows hold of prompts that begin alike; see `prefix_reuse`.

        Raises:
          GenerationError: there is no such cache dtype.
        """
        self._cache_dtype = check_cache_dtype(cache_dtype)
        with runtime.on_mesh():
            self.shards = data_shards()
            self.pool = pool if pool is not None else FeaturePool(runtime)
        self.runtime = runtime
        self.num_rows = self.shards * -(-num_rows // self.shards)
        self.variant = variant or Variant()
        self.stats = stats if stats is not None else Stats()
        self._num_eos = MIN_EOS
        self._capacity = self.capacity_for(capacity)
        self._state: SlotsState | None = None
        self._steps = np.zeros(self.num_rows, np.int32)
        """new tokens of each row, as last read"""
        self._constraints: Constraints | None = None
        """None if no row has any, so that the ordinary programs run"""
        self._constrained: set[int] = set()
        """rows that may be running with constraints"""
        self._history: jax.Array | None = None
        """[B, capacity]: the tokens of each row, where they are looked up"""
        self._table = TableShape()
        self.prefilling: dict[int, _Prefilling] = {}
        self.reused: dict[int, int] = {}
        self._chunk, self._whole = CHUNK, 0
        self.reuses = reuse_prefixes
        self._contents = RowContents(self.num_rows, self.shards)

    def capacity_for(self, need: int) -> int:
        """Round a number of cache slots up to one of few numbers, which the mesh can split."""
        with self.runtime.on_mesh():
            return round_up(bucket(need, MIN_CAPACITY), "slots")

    @property
    def capacity(self) -> int:
        """Cache slots of a row."""
        return self._capacity

    @property
    def _most(self) -> int:
        """Decode steps of a dispatch at most."""
        return SCORED_STEPS if self.variant.scores or self.variant.logits else MAX_STEPS

    def use_chunks(self, longest: int, whole: int = 0) -> None:
        """Prefill rows in chunks of `longest` tokens at most, a power of two; call it while all rows are free.

        A prompt of up to `whole` tokens is one chunk.
        """
        if (longest, whole) != (self._chunk, self._whole):
            self._chunk, self._whole = longest, whole
            self._contents.forget()

    def forget(self) -> None:
        """Forget what rows hold of earlier prompts."""
        self._contents.forget()

    def use(self, runtime: Runtime) -> None:
        """Run another model of the same structure from now on; call it while all rows are free."""
        self.runtime = runtime
        self.forget()

    def place(self, start: Start, free: Sequence[int]) -> int:
        """Choose one of the rows `free` for a prompt: where most of it can be reused and the least is lost."""
        if start.keep or not self.reuses:
            return free[0]
        return self._contents.choose(self._prefix(start), free)

    def start(self, starts: Mapping[int, Start], *, together: bool = False, upcoming: Sequence[Medium] = ()) -> Chosen:
        """Prefill rows, each with its prompt, and choose their first tokens.

        Args:
          starts: row -> its prompt.
          together: all rows at once, which ends those that are not among `starts`; otherwise one row of each shard at a
            time, so that programs have the same shapes whatever the number of rows.
          upcoming: images and videos of prompts in the queue: encoded with these where that costs nothing.

        Returns:
          The tokens, [B], perhaps still being computed; valid for the rows of `starts`.
        """
        if together:
            with self.runtime.on_mesh(), self.pool.lock:
                self._make_room(starts)
                self._prefill(starts, upcoming)
            self._steps[:] = 0
            self._count(starts)
            return self.choose_first(starts, together=True)
        self.admit(starts)
        while self.prefilling:
            self.advance(upcoming)
        return self.choose_first(starts)

    def admit(self, starts: Mapping[int, Start]) -> None:
        """Queue rows, each with its prompt, for `advance`; those that are restarted come first."""
        if not starts:
            return
        new = {row: _Prefilling(start, self._prefix(start)) for row, start in starts.items()}
        if self._state is None:
            self.pool.prepare([medium for start in starts.values() for medium in start.prompt.media_from(start.keep)])
            ends = ([0, *one.prefix.ends, len(one.start.prompt)] for one in new.values())
            self.prepare(starts, (end - begin for own in ends for begin, end in itertools.pairwise(own) if end > begin))
        with self.runtime.on_mesh():
            self._make_room(starts)
        self._contents.used(new)
        self._count(starts)
        # Where rows of several shards go together, longest first: what goes together is as long as its longest.
        order = sorted(new, key=lambda row: -new[row].start.new_tokens if self.shards > 1 else 0)
        self.prefilling |= {row: new[row] for row in order}
        first = sorted(self.prefilling, key=lambda row: self.prefilling[row].start.step == 0)
        self.prefilling = {row: self.prefilling[row] for row in first}

    def prepare(self, starts: Mapping[int, Start], lengths: Iterable[int]) -> None:
        """Read or compile the programs of such rows concurrently; prompts are in chunks of these lengths."""
        if not stored_programs.is_used():
            return
        with self.runtime.on_mesh(), self.pool.lock:
            self._make_room(starts)
            assert self._state is not None
            text, head, state, variant = self.runtime.text, self.runtime.head, self._state, self.variant
            slots = None if self.num_rows == 1 else np.zeros(self.shards, np.int32)
            for t in dict.fromkeys(map(self._padded, lengths)):
                chunk = chunk_arrays(ChunkBounds(t, {}), {}, {}, self.shards)
                device_steps.prefill.prepare(text, state, slots, chunk, self._seen({}, self.shards), self.pool.array)
            if variant.draft is not None or any(start.config.is_constrained or start.turn for start in starts.values()):
                return
            device_steps.choose_first.prepare(
                text, head, state.hidden, state.seen, state.row, np.ones(self.num_rows, np.bool_), self._row_of({}),
                None, None, variant=variant,
            )  # fmt: skip
            if not any(start.is_decoded for start in starts.values()):
                return
            one = np.int32(1)
            device_steps.decode.prepare(text, head, state, one, one, None, None, num_steps=self._most, variant=variant)

    def advance(self, upcoming: Sequence[Medium] = ()) -> dict[int, Start]:
        """Prefill a chunk of the first row of each shard that is being prefilled.

        Meanwhile other rows may decode between chunks: on the device this row is done.

        Args:
          upcoming: see `start`.

        Returns:
          The rows whose prompts are complete now, ready for `choose_first`.
        """
        per_shard = self.num_rows // self.shards
        wave: dict[int, int] = {}
        for row in self.prefilling:
            wave.setdefault(row // per_shard, row)
        # Until the programs have been dispatched with the pool, no other thread may write it.
        with self.runtime.on_mesh(), self.pool.lock:
            self._reuse([row for row in wave.values() if self.prefilling[row].done is None])
            self._prefill_wave({i: row for i, row in wave.items() if self._left(self.prefilling[row])}, upcoming)
        ready = [row for row in wave.values() if not self._left(self.prefilling[row])]
        return {row: self.prefilling.pop(row).start for row in ready}

    def wait(self) -> None:
        """Wait until what has been dispatched is done."""
        assert self._state is not None
        jax.block_until_ready(self._state.hidden)

    def choose_first(self, starts: Mapping[int, Start], *, together: bool = False) -> Chosen:
        """Choose the first tokens of rows that have been prefilled; see `start`."""
        rows = np.isin(np.arange(self.num_rows), list(starts))
        state = self._state
        assert state is not None
        with self.runtime.on_mesh():
            self._constrain(starts, rows)
            masks = self._masks({row: start.turn for row, start in starts.items() if start.turn is not None})
            seen, row, chosen = device_steps.choose_first(
                self.runtime.text, self.runtime.head, state.hidden, state.seen, state.row, rows | together,
                self._row_of(starts), self._constraints, masks, variant=self.variant,
            )  # fmt: skip
            self._state = state._replace(seen=seen, row=row)
            if self.variant.draft is not None:
                self._history = prompt_lookup.remember(self._history, rows, self._tokens(starts))
        self._steps[rows] = [starts[row].step + 1 for row in sorted(starts)]
        return chosen

    def prefill(self, starts: Mapping[int, Start]) -> tuple[SlotsState, RowState, Constraints | None]:
        """Prefill all rows at once without choosing tokens, and give the state away: what `beam_search` begins with."""
        with self.runtime.on_mesh(), self.pool.lock:
            self._make_room(starts)
            self._prefill(starts, ())
            self._constrain(starts, np.ones(self.num_rows, np.bool_))
        self._count(starts)
        state, self._state = self._state, None
        assert state is not None
        return state, self._row_of(starts), self._constraints

    def prefetch(self, upcoming: Sequence[Medium]) -> None:
        """Encode images and videos of prompts in the queue, while the device works."""
        self.pool.prefetch(upcoming)

    def decode(
        self, limit: int = MAX_STEPS, *, idle: int | None = None, turns: Mapping[int, Turn] | None = None
    ) -> Decoded:
        """Dispatch up to `limit` decode steps of every row, fewer once `idle` rows are done (all by default).

        With 0 nothing is dispatched: all rows that run are done, as those are whose first token is their last.
        With prompt lookup steps until a row has `limit` tokens, perhaps a few more. `turns`: row -> what its
        grammar allows.
        """
        if limit == 0:
            none = Chosen(np.zeros((self.num_rows, 0), np.int32))
            return Decoded(none, self._steps, np.ones(self.num_rows, np.bool_), np.int32(0))
        text, head = self.runtime.text, self.runtime.head
        assert self._state is not None
        most = self._most
        bounds = np.int32(min(limit, most)), np.int32(min(idle or self.num_rows, self.num_rows))
        now = text, head, self._state, *bounds, self._constraints
        with self.runtime.on_mesh():
            if self.variant.draft is None:
                decoded, self._state, self._constraints = device_steps.decode(
                    *now, self._masks(turns or {}), num_steps=most, variant=self.variant
                )
            else:
                assert self._history is not None
                decoded, self._state, self._constraints, self._history = prompt_lookup.decode(
                    *now, self._history, num_steps=most, variant=self.variant
                )
        self.stats.dispatches += 1
        return decoded

    def read(self, decoded: Decoded) -> tuple[Chosen, np.ndarray, np.ndarray]:
        """Wait for a dispatch: tokens [B, K] in NumPy, the number of new ones of each row, and which rows are done."""
        chosen, step, done, steps = to_host(decoded)
        counts = step - self._steps
        self._steps = step.copy()
        self._constrained -= set(np.flatnonzero(done).tolist())
        self._contents.used(np.flatnonzero(counts).tolist())
        self.stats.slot_steps += int(counts.max() if steps is None else steps) * self.num_rows
        self.stats.busy_steps += int(counts.sum())
        return chosen, counts, done

    def stop(self, rows: list[int]) -> None:
        """End rows before they are done, or before they have been prefilled."""
        self._constrained -= set(rows)
        for row in rows:
            self.prefilling.pop(row, None)
        if self._state is None or not rows:
            return
        with self.runtime.on_mesh():
            self._state = device_steps.stop(self._state, np.isin(np.arange(self.num_rows), rows))

    def _prefix(self, start: Start) -> Prefix:
        return Prefix.of(start.prompt, self._chunk, self._whole)

    def _count(self, starts: Mapping[int, Start]) -> None:
        self.stats.prompt_tokens += sum(len(start.prompt) for start in starts.values())
        self.stats.prefill_tokens += sum(start.new_tokens for start in starts.values())

    def _padded(self, length: int) -> int:
        """The length of the program for a chunk; below `MIN_LENGTH` only where chunks are as short."""
        return bucket(length, MIN_LENGTH if length > self._chunk else min(MIN_LENGTH, self._chunk))

    def _left(self, one: _Prefilling) -> int:
        """Tokens that a row has still to be prefilled with."""
        return len(one.start.prompt) - (one.done or 0)

    def _reuse(self, rows: Iterable[int]) -> None:
        """Give each of these rows, of different shards, what some row of its shard holds of its prompt."""
        n = self.shards
        sources, targets, keep = np.full(n, -1, np.int32), np.full(n, -1, np.int32), np.zeros(n, np.int32)
        copies: dict[int, Start] = {}
        for row in rows:
            one = self.prefilling[row]
            one.done = one.start.keep
            if one.done or not self.reuses:
                continue
            source, count = self._contents.source(one.prefix, row)
            one.done = count
            self.stats.reused_tokens += count
            self.reused[row] = count
            self.stats.prefill_tokens -= count
            if count and (source != row or count == one.prefix.length):
                i, per_shard = row // (self.num_rows // n), self.num_rows // n
                sources[i], targets[i], keep[i] = source % per_shard, row % per_shard, count
                copies[i] = one.start
                self._contents.copied(one.prefix, row, count)
        if copies:
            assert self._state is not None
            self._state = device_steps.copy_rows(self._state, sources, targets, keep, self._seen(copies, n))

    def _prefill_wave(self, wave: Mapping[int, int], upcoming: Sequence[Medium]) -> None:
        """Prefill the next chunk of these rows, at most one of each shard: shard -> row."""
        if not wave:
            return
        n, per_shard = self.shards, self.num_rows // self.shards
        ones = {i: self.prefilling[row] for i, row in wave.items()}
        starts = {i: one.start for i, one in ones.items()}
        bounds, lengths = {}, {}
        for i, one in ones.items():
            begin = one.done or 0
            bounds[i] = begin, next((end for end in one.prefix.ends if end > begin), len(one.start.prompt))
            lengths[i] = self._padded(bounds[i][1] - begin)
        t = max(lengths.values())
        for i, (begin, end) in bounds.items():
            if begin + t > self._capacity:  # its padding would not fit
                bounds[i] = max(0, min(begin, end - t)), end
            self._contents.cut(wave[i], bounds[i][0])
        later = (
            medium
            for one in self.prefilling.values()
            for medium in one.start.prompt.media_from(one.start.keep if one.done is None else one.done)
        )
        slots = _slots_of(wave, n, per_shard)
        self._dispatch(ChunkBounds(t, bounds), starts, n, slots, itertools.chain(later, upcoming))
        for i, (begin, end) in bounds.items():
            ones[i].done = end
            if self._padded(end - begin) == t:
                self._contents.written(ones[i].prefix, wave[i], begin, end)

    def _prefill(self, starts: Mapping[int, Start], upcoming: Sequence[Medium]) -> None:
        """Prefill prompts in all B rows at once."""
        self._contents.forget()
        for chunk in chunk_bounds(starts, self._capacity):
            self._dispatch(chunk, starts, self.num_rows, None, upcoming)

    def _dispatch(
        self,
        chunk: ChunkBounds,
        starts: Mapping[int, Start],
        n: int,
        slots: np.ndarray | None,
        upcoming: Iterable[Medium],
    ) -> None:
        """Prefill a chunk: of all B rows by their number (`slots` None), or of one of each shard by its number."""
        assert self._state is not None
        arrays = chunk_arrays(chunk, starts, self._encode_vision(chunk, starts, upcoming), n)
        self._state = device_steps.prefill(
            self.runtime.text, self._state, slots, arrays, self._seen(starts, n), self.pool.array
        )

    def _seen(self, starts: Mapping[int, Start], n: int) -> np.ndarray:
        """Bool [n, V]: the tokens of each row's prompt."""
        seen = np.zeros((n, self.runtime.config.text_config.vocab_size), np.bool_)
        for i, start in starts.items():
            seen[i, start.prompt.input_ids] = True
        return seen

    def _tokens(self, starts: Mapping[int, Start]) -> np.ndarray:
        """int32 [B, capacity]: each row's prompt."""
        tokens = np.zeros((self.num_rows, self._capacity), np.int32)
        for i, start in starts.items():
            tokens[i, : len(start.prompt)] = start.prompt.input_ids
        return tokens

    def _encode_vision(
        self, chunk: ChunkBounds, starts: Mapping[int, Start], upcoming: Iterable[Medium]
    ) -> dict[int, np.ndarray]:
        """int32 [T] of each row, valid in its chunk: -1 for text, otherwise the token's index in the pool."""
        media = [medium for i, bounds in chunk.bounds.items() for medium in starts[i].prompt.media_from(*bounds)]
        begins = self.pool.encode(media, upcoming) if media else []
        merged = self.runtime.config.vision_config.spatial_merge_size**2
        features = {
            medium: begin + np.arange(len(medium.patches) // merged)
            for medium, begin in zip(media, begins, strict=True)
        }
        return {i: start.prompt.vision_index(features) for i, start in starts.items()}

    def _row_of(self, starts: Mapping[int, Start]) -> RowState:
        row = RowState.free(self.num_rows, self._num_eos)
        for i, start in starts.items():
            config = start.config
            row.delta[i], row.done[i], row.step[i], row.limit[i] = start.prompt.delta, False, start.step, start.limit
            row.eos[i, : len(config.eos_token_id)] = config.eos_token_id
            row.seed[i], row.number[i] = config.seed, start.number
            for values, value in zip(row.params, config.sampling, strict=True):
                np.asarray(values)[i] = value
        return row

    def _constrain(self, starts: Mapping[int, Start], rows: np.ndarray) -> None:
        """Put the constraints of these rows on the device, if they or any other running row have some."""
        asking = {row: start.config for row, start in starts.items() if start.config.is_constrained}
        self._constrained = (self._constrained - starts.keys()) | asking.keys()
        if not self._constrained:
            self._constraints = None
            return
        self._table, capacity = TableShape.of(asking, self._table), self._capacity
        old = self._constraints
        if old is not None and (old.tokens.shape[1] != capacity or old.prefixes.shape[1:] != self._table):
            old = grown(old, capacity, self._table)
        contents = {row: (starts[row].prompt.input_ids, config) for row, config in asking.items()}
        vocab = self.runtime.config.text_config.vocab_size
        new = constraints_of(contents, self.num_rows, capacity, vocab, self._table)
        self._constraints = merged(rows, new, old)

    def _masks(self, turns: Mapping[int, Turn]) -> TokenMasks | None:
        return masks_of(turns, self.num_rows, self.runtime.config.text_config.vocab_size)

    def _make_room(self, starts: Mapping[int, Start]) -> None:
        """Create the state, or grow it to what these prompts need."""
        # Drafts are written after the last token.
        need = max(start.capacity for start in starts.values()) + (self.variant.draft or 0)
        num_eos = bucket(max(len(start.config.eos_token_id) for start in starts.values()), self._num_eos)
        capacity = max(self._capacity, self.capacity_for(need))
        state = self._state
        if state is None:
            self._num_eos, self._capacity = num_eos, capacity
            self._state = device_steps.init_state(
                self.runtime.text, self.num_rows, capacity, num_eos, stacked=self.runtime.is_stacked,
                cache_dtype=self._cache_dtype,
            )  # fmt: skip
            return
        if capacity > self._capacity:
            self._capacity = capacity
            self._contents.forget()  # attention to more slots may round differently
            state = state._replace(cache=kv_cache.grow(state.cache, capacity))
        if num_eos > self._num_eos:
            self._num_eos = num_eos
            state = state._replace(row=state.row._replace(eos=device_steps.grow_eos(state.row.eos, num_eos)))
        self._state = state


def _slots_of(wave: Mapping[int, int], n: int, per_shard: int) -> np.ndarray | None:
    """int32 [n]: the row of each shard, counted within it, -1 for none; None where there is but one row."""
    if n == per_shard == 1:
        return None
    return np.array([wave[i] % per_shard if i in wave else -1 for i in range(n)], np.int32)
