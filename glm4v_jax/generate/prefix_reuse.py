"""What the caches of rows hold of prompts, so that a prompt that begins like one before need not be prefilled whole.

Only whole prefill chunks are shared, and whole prompts. A chunk's keys depend on what comes before it, and on the
shapes that it is run with, which depend on nothing else (`prefill_chunks.chunk_ends`): so keys that are kept or copied
equal those that would be computed, to the last bit. Keys of answers do not, for decoding has other shapes.
"""

import dataclasses
import hashlib
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np

from glm4v_jax.generate.prefill_chunks import chunk_ends
from glm4v_jax.inputs.prompt import Prompt


class Prefix(NamedTuple):
    """A prompt by the digests of its beginnings: tokens, positions, and the content of images and videos.

    Attributes:
      ends: where its chunks end, see `chunk_ends`.
      digests: of the prompt up to each of them.
      length: tokens of the whole prompt.
      whole: its digest.
    """

    ends: tuple[int, ...]
    digests: tuple[bytes, ...]
    length: int
    whole: bytes

    @classmethod
    def of(cls, prompt: Prompt, longest: int, whole: int = 0) -> "Prefix":
        """Digest a prompt; `longest`, `whole`: of its chunks, see `chunk_ends`.

        >>> one, other = (Prefix.of(Prompt.of_text(tokens), 2) for tokens in ([5, 6, 7], [5, 6, 8, 9]))
        >>> one.ends, one.digests == other.digests[:1], one.whole == other.whole
        ((2,), True, False)
        """
        ends, digests, begin = chunk_ends(prompt, longest, whole), list[bytes](), 0
        digest = hashlib.blake2b(digest_size=16)
        for end in (*ends, len(prompt)):
            here = slice(begin, end)
            for part in (prompt.input_ids[here], prompt.position_ids[:, here], prompt.medium_of[here]):
                digest.update(np.ascontiguousarray(part, np.int32).data)
            digest.update(np.ascontiguousarray(prompt.offset_of[here], np.int32).data)
            for medium in prompt.media_from(begin, end):
                digest.update(medium.key)
            digests.append(digest.copy().digest())
            begin = end
        return cls(tuple(ends), tuple(digests[:-1]), len(prompt), digests[-1])


@dataclasses.dataclass
class _Content:
    """What a row holds: chunks from the beginning of a prompt on, and of which whole prompt it has the last state."""

    ends: list[int] = dataclasses.field(default_factory=list)
    digests: list[bytes] = dataclasses.field(default_factory=list)
    whole: bytes | None = None
    used: int = 0
    """when it was used last, counted in uses of any row"""

    @property
    def length(self) -> int:
        return self.ends[-1] if self.ends else 0

    def common(self, prefix: Prefix) -> int:
        """Tokens that the row holds of a prompt: all, or fewer."""
        if self.whole == prefix.whole:
            return prefix.length
        count = 0
        for own, other, end in zip(self.digests, prefix.digests, prefix.ends, strict=False):
            if own != other or end == prefix.length:  # the state after its last token is not there
                break
            count = end
        return count

    def cut(self, length: int) -> None:
        """Forget what comes after `length` tokens."""
        count = sum(end <= length for end in self.ends)
        self.whole = None
        del self.ends[count:], self.digests[count:]


class RowContents:
    """The contents of all rows; rows of one shard of the batch can be copied to each other."""

    def __init__(self, num_rows: int, shards: int):
        """All rows are empty."""
        self._rows = [_Content() for _ in range(num_rows)]
        self._per_shard = num_rows // shards
        self._uses = 0

    def choose(self, prefix: Prefix, free: Sequence[int]) -> int:
        """Choose one of these rows for a prompt.

        Where the longest beginning of it can be had; there a row that loses nothing by it, or else the row that was
        used least recently.
        """
        counts = [content.common(prefix) for content in self._rows]
        best = [max(counts[i : i + self._per_shard]) for i in range(0, len(counts), self._per_shard)]

        def badness(row: int) -> tuple[int, bool, int, int]:
            content, count = self._rows[row], counts[row]
            loses = count < content.length or (content.whole is not None and not count)
            return -best[row // self._per_shard], loses, 0 if loses else -count, content.used

        return min(free, key=badness)

    def source(self, prefix: Prefix, row: int) -> tuple[int, int]:
        """The row that holds most of a prompt, of those that `row` can copy from, and how many tokens; `row` first."""
        shard = row // self._per_shard * self._per_shard
        rows = sorted(range(shard, shard + self._per_shard), key=lambda other: other != row)
        counts = [self._rows[other].common(prefix) for other in rows]
        return rows[int(np.argmax(counts))], max(counts)

    def copied(self, prefix: Prefix, row: int, count: int) -> None:
        """Note that a row holds the first `count` tokens of a prompt, and the state after them if they are all."""
        content = self._rows[row]
        kept = sum(end <= count for end in prefix.ends)
        content.ends, content.digests = list(prefix.ends[:kept]), list(prefix.digests[:kept])
        content.whole = prefix.whole if count == prefix.length else None

    def cut(self, row: int, begin: int) -> None:
        """Note that a row will be written from slot `begin` on."""
        self._rows[row].cut(begin)

    def written(self, prefix: Prefix, row: int, begin: int, end: int) -> None:
        """Note that a chunk of a prompt was run with the shapes that it always has."""
        content = self._rows[row]
        count = len(content.ends)
        if begin != content.length or tuple(content.digests) != prefix.digests[:count]:
            return  # after tokens that were decoded
        if prefix.ends[count : count + 1] == (end,):
            content.ends.append(end)
            content.digests.append(prefix.digests[count])
        if end == prefix.length:
            content.whole = prefix.whole

    def used(self, rows: Iterable[int]) -> None:
        """Note that rows are in use."""
        self._uses += 1
        for row in rows:
            self._rows[row].used = self._uses

    def forget(self) -> None:
        """Note that no row holds anything that may be used."""
        self._rows = [_Content() for _ in self._rows]
