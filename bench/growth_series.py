"""The series that `bench.growth` measures, a row each, and the panels of its chart."""

from collections.abc import Callable, Mapping, Sequence
from typing import Literal, NamedTuple

from bench import growth_host as host
from bench import growth_programs as programs
from bench.growth_host import Work

Unit = Literal["s", "bytes"]

UNITS: Mapping[Unit, Sequence[tuple[float, str]]] = {
    "s": ((1, "s"), (1e-3, "ms"), (1e-6, "µs")),
    "bytes": ((1e9, "GB"), (1e6, "MB"), (1e3, "kB"), (1, "B")),
}

TOLERANCE = 0.2
"""By which a slope may exceed what is expected: caches of the processor end between two sizes."""


def amount(value: float, unit: Unit) -> str:
    """A figure with its unit.

    >>> amount(0.0123, "s"), amount(4.5e6, "bytes")
    ('12 ms', '4.5 MB')
    """
    scale, name = next((one for one in UNITS[unit] if value >= one[0]), UNITS[unit][-1])
    shown = value / scale
    return f"{shown:.2g} {name}" if shown < 100 else f"{shown:,.0f} {name}"


class Panel(NamedTuple):
    """A part of the chart: series over the same unit. What grows is the title, with what is `x`."""

    title: str
    x: str
    unit: Unit


class Series(NamedTuple):
    """What is measured at sizes that double.

    panel: where it is drawn.
    name: what is done.
    sizes: ascending.
    work: size -> what is timed, or returns a figure; prepared outside of the time.
    slope: the most that is expected.
    is_sum: whether it is a linear and a quadratic part, which are fitted.
    why: what a reader should know of it.
    """

    panel: Panel
    name: str
    sizes: tuple[int, ...]
    work: Callable[[int], Work]
    slope: float = 1
    is_sum: bool = False
    why: str = ""

    @property
    def key(self) -> str:
        """Panel and name."""
        return f"{self.panel.title}: {self.name}"

    @property
    def unit(self) -> Unit:
        """Of the values."""
        return self.panel.unit


def _doubled(first: int, last: int) -> tuple[int, ...]:
    """From 2**first to 2**last."""
    return tuple(2**power for power in range(first, last + 1))


VIT = Panel("ViT", "patches of an image", "s")
PREFILL = Panel("Prefill", "tokens of a prompt", "s")
MEMORY = Panel("Temporaries of programs", "tokens or patches", "bytes")
CACHE = Panel("Cache", "slots of a row", "bytes")
SLOTS = Panel("Decoding", "rows at a time", "s")
REQUESTS = Panel("Engine", "requests", "s")
IMAGES = Panel("Images", "images of a prompt", "s")
FRAMES = Panel("Video", "frames", "s")
TURNS = Panel("Conversation", "turns", "s")
TEXT = Panel("Text", "tokens", "s")
ROWS = Panel("Data", "rows", "s")
INDEX = Panel("Data in memory", "rows", "bytes")
PACKING = Panel("Packing 4,000 samples", "rows of a batch", "s")
CHECKPOINT = Panel("Checkpoint", "MB of weights", "s")
LOADING = Panel("Loading in memory", "MB of weights", "bytes")
DEVICES = Panel("Memory of a device", "devices", "bytes")
STEP = Panel("Decode step of the 9B", "chips", "s")

ATTENTION = "products grow with the length, attention with its square"

SERIES = (
    Series(VIT, "an image encoded", _doubled(8, 13), programs.encode_image, 2, True, ATTENTION),
    Series(PREFILL, "to the first token", _doubled(8, 13), programs.prefill_prompt, 2, True, ATTENTION),
    Series(MEMORY, "ViT", _doubled(12, 15), programs.encode_memory, why="up to 2,048 patches scores [S, S] are kept"),
    Series(MEMORY, "prefill at once", _doubled(12, 15), programs.prefill_memory),
    Series(MEMORY, "a prefill chunk", _doubled(12, 15), programs.chunk_memory, why="only what it reads grows"),
    Series(MEMORY, "a training step", _doubled(11, 14), programs.train_memory),
    Series(CACHE, "keys and values of eight rows", _doubled(10, 13), programs.cache_memory),
    Series(
        SLOTS, "64 steps, tiny model", (1, 4, 8, 16, 32), programs.decode_rows,
        why="keys and values of 32 rows leave the CPU's caches",
    ),
    Series(REQUESTS, "four tokens each, 8 slots", _doubled(4, 8), host.answer_requests),
    Series(IMAGES, "messages to patches", _doubled(3, 9), host.read_images),
    Series(IMAGES, "a batch of them", _doubled(3, 9), host.batch_images),
    Series(IMAGES, "common prefix", _doubled(3, 9), host.compare_images),
    Series(FRAMES, "frames to patches", _doubled(5, 10), host.read_frames),
    Series(FRAMES, "places in rows", _doubled(7, 12), host.place_frames, why="n log n"),
    Series(TURNS, "to tokens", _doubled(3, 10), host.read_turns),
    Series(
        TURNS, "to a training sample", _doubled(3, 7), host.encode_turns, 2,
        why="every answer's prompt is rendered as for generation, which proves that targets are where it writes them",
    ),
    Series(TEXT, "a prompt", _doubled(10, 16), host.read_text),
    Series(TEXT, "an answer", _doubled(10, 15), host.take_tokens),
    Series(TEXT, "an answer with stops", _doubled(10, 15), host.take_with_stops),
    Series(ROWS, "open", _doubled(10, 16), host.open_lines),
    Series(ROWS, "read", _doubled(8, 13), host.read_lines),
    Series(ROWS, "pack", _doubled(8, 13), host.pack_samples),
    Series(INDEX, "offsets of lines", _doubled(10, 16), host.hold_lines),
    Series(PACKING, "all samples", _doubled(1, 7), host.pack_into_rows, 0.2, why="a tree of rows: log n"),
    Series(CHECKPOINT, "load", _doubled(4, 8), host.load_checkpoint),
    Series(CHECKPOINT, "save", _doubled(4, 8), host.save_checkpoint),
    Series(
        LOADING, "peak of the process", _doubled(4, 8), host.peak_of_load,
        why="twice the weights: pages of files count too, and go back to the system 512 MB at a time",
    ),
    Series(
        DEVICES, "training, simulated, fsdp", (1, 2, 4, 8), programs.device_memory, -0.7,
        why="weights, moments and batch are in shards; what is gathered for a layer is not",
    ),
    Series(
        DEVICES, "the 9B decodes, TPU v5e", (4, 8, 16), programs.slice_memory, -0.7,
        why="17.4 GiB of weights are in shards of all chips, the cache of two key heads in two: 0.6 GiB a chip",
    ),
    Series(
        STEP, "estimated, TPU v5e", (4, 8, 16), programs.slice_seconds, -0.4,
        why="the cache is read by two shards; overhead of instructions and exchanges stay",
    ),
)  # fmt: skip
