"""Images and videos to patches: beside transformers' fast processors, and beside decoders alone; over threads and processes.

    python -m bench.preprocess [--rounds N] [--tiny]

Does preprocessing keep an accelerator busy? Real photographs and videos, in one run, by sides that take turns:

- images: arrays of one size or of many in one call, and files, which are decoded too; both fast processors.
- videos: two frames a second from the file to patches; and all frames decoded, by decord and PyAV alone.
- scaling: one photograph a call, in one and two threads, and in one and two processes.
- overlap: batches of a training job's stream beside steps of a device that take as long as a batch.

Prints tables; writes `bench/results/preprocess.json` for [Performance](docs/guides/performance.md); exits with status 1
if an aim is missed or patches differ.
"""  # noqa: E501

import concurrent.futures
import functools
import hashlib
import json
import multiprocessing
import os
import pathlib
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import PIL.Image

from bench import media, reference, report, turns
from bench.turns import TimedTask
from glm4v_jax.tiny import TINY_CHECKPOINT

PHOTOGRAPHS = [name for name in media.PHOTOGRAPHS if name != "logo.png"]
"""Without the one that has no colors."""
SIZE, COUNT = (640, 480), 16
VIDEO, RATE = "bikes.mp4", 2
AIM = 1.0
BATCHES = 12
"""Of a training job, of which the first ones are not timed."""


def photographs(kind: str, count: int) -> list[Any]:
    """Photographs of one size, of their own sizes, or their files."""
    names = [PHOTOGRAPHS[i % len(PHOTOGRAPHS)] for i in range(count)]
    if kind == "files":
        return [str(media.photograph(name)) for name in names]
    images = [PIL.Image.open(media.photograph(name)).convert("RGB") for name in names]
    return [np.asarray(image.resize(SIZE) if kind == "one size" else image) for image in images]


def digest(patches: Any) -> str:
    """Of patches [N, P]."""
    return hashlib.blake2b(np.ascontiguousarray(patches, np.float32).data, digest_size=8).hexdigest()


def timed(work: Callable[[], Any], amount: Callable[[Any], int] = len) -> dict[str, Any]:
    """Do work once; seconds, and how much was done."""
    start = time.perf_counter()
    found = work()
    return {"seconds": time.perf_counter() - start, "amount": amount(found)}


class Ours(turns.JaxSide):
    """The package's fast processors."""

    packages = ("numpy", "pillow", "decord", "av")

    def images(self, kind: str, count: int) -> dict[str, Any]:
        """Photographs in one call."""
        from glm4v_jax import Glm4vImageProcessorFast

        found, given = dict[str, Any](), photographs(kind, count)
        line = timed(lambda: found.update(Glm4vImageProcessorFast()(given)), lambda _: count)
        return line | {"digest": digest(found["pixel_values"])}

    def video(self, count: int) -> dict[str, Any]:
        """A video from its file to patches, `count` times."""
        from glm4v_jax import Glm4vVideoProcessor

        processor, path = Glm4vVideoProcessor.from_pretrained(TINY_CHECKPOINT), str(media.video(VIDEO))

        def work() -> list[Any]:
            return [processor([path], do_sample_frames=True, fps=RATE)["video_grid_thw"] for _ in range(count)]

        return timed(work, lambda grids: sum(2 * int(grid[0, 0]) for grid in grids))

    def decode(self, decoder: str) -> dict[str, Any]:
        """All frames of a video; with a decoder's own name by it alone."""
        path = media.video(VIDEO)
        if decoder == "decord":
            import decord

            return timed(lambda: (reader := decord.VideoReader(str(path))).get_batch(range(len(reader))).asnumpy())
        if decoder == "PyAV":
            import av

            with av.open(str(path)) as container:
                container.streams.video[0].thread_type = "AUTO"
                return timed(lambda: [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])
        from glm4v_jax.inputs.media.decode import decode_video

        return timed(lambda: decode_video(path, path.name)[0])

    def scaled(self, way: str, workers: int, count: int) -> dict[str, Any]:
        """Photographs from their files, one a call, in `workers` threads or processes."""
        files = photographs("files", count)
        pools: dict[str, Callable[[], concurrent.futures.Executor]] = {
            "threads": lambda: concurrent.futures.ThreadPoolExecutor(workers),
            "processes": lambda: concurrent.futures.ProcessPoolExecutor(
                workers, multiprocessing.get_context("spawn"), initializer=_use_core
            ),
        }
        with pools[way]() as pool:
            list(pool.map(prepare, files[:1] * 2 * workers))  # processes have started
            return timed(lambda: list(pool.map(prepare, files)))

    def overlap(self, batches: int) -> dict[str, float]:
        """Seconds of a batch that is prepared alone, and of one beside a step of a device that takes as long."""
        with tempfile.TemporaryDirectory() as directory:
            alone = _stream_seconds(pathlib.Path(directory), batches, 0.0)
            return {"data": alone, "step": alone, "both": _stream_seconds(pathlib.Path(directory), batches, alone)}


class Theirs(turns.TorchSide):
    """The reference's fast processors; decord reads its videos."""

    packages = ("torch", "torchvision", "transformers")

    def images(self, kind: str, count: int) -> dict[str, Any]:
        """Photographs in one call, which are grouped by their sizes."""
        reference.import_transformers()
        from transformers.models.glm4v.image_processing_glm4v_fast import Glm4vImageProcessorFast

        found, given = dict[str, Any](), photographs(kind, count)

        def work() -> None:
            images = [PIL.Image.open(image).convert("RGB") for image in given] if kind == "files" else given
            found.update(Glm4vImageProcessorFast()(images, return_tensors="pt"))

        return timed(work, lambda _: count) | {"digest": digest(found["pixel_values"].numpy())}

    def video(self, count: int) -> dict[str, Any]:
        """A video from its file to patches, `count` times."""
        processor = reference.load_processor(TINY_CHECKPOINT).video_processor
        path = str(media.video(VIDEO))

        def work() -> list[Any]:
            options = dict(do_sample_frames=True, fps=RATE, return_tensors="pt")
            return [processor([path], **options)["video_grid_thw"] for _ in range(count)]

        return timed(work, lambda grids: sum(2 * int(grid[0, 0]) for grid in grids))


def _use_core() -> None:
    """Confine this process to one core: the machine has as many processes as cores."""
    if hasattr(os, "sched_setaffinity"):
        cores = sorted(os.sched_getaffinity(0))
        os.sched_setaffinity(0, {cores[os.getpid() % len(cores)]})


@functools.cache
def _processor() -> Any:
    from glm4v_jax import Glm4vImageProcessorFast

    return Glm4vImageProcessorFast()


def prepare(path: str) -> int:
    """A photograph from its file to patches."""
    return len(_processor()([path])["pixel_values"])


def _stream_seconds(directory: pathlib.Path, batches: int, step: float) -> float:
    """Seconds per batch of a job's stream, each followed by `step` seconds in which the CPU is idle."""
    from glm4v_jax import Glm4vConfig, Glm4vProcessor
    from glm4v_jax.devices.mesh import make_mesh
    from train.config import BatchConfig, DataConfig
    from train.data.encoder import make_encoder
    from train.data.records import read_records
    from train.data.stream import AHEAD, Stream

    asked = {"role": "user", "content": "<image>What is it?"}, {"role": "assistant", "content": "A photograph."}
    rows = [{"messages": asked, "images": [str(media.photograph(name))]} for name in PHOTOGRAPHS]
    path = directory / "data.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    config, processor = (one.from_pretrained(TINY_CHECKPOINT) for one in (Glm4vConfig, Glm4vProcessor))
    data = DataConfig(files=(str(path),), image_max_pixels=SIZE[0] * SIZE[1], threads=4)
    batch = BatchConfig(rows=1, length=2048, vision_rows=1, vision_length=6144)
    encoder = make_encoder(read_records(path), processor, config, data, batch)
    stream = Stream(encoder, config, data, batch, make_mesh(), log=print)
    try:
        for _ in range(min(2 * AHEAD, batches)):
            next(stream)
        start = time.perf_counter()
        for _ in range(batches):
            next(stream)
            time.sleep(step)
        return (time.perf_counter() - start) / batches
    finally:
        stream.close()


def _both(task: str, **arguments: Any) -> dict[str, TimedTask]:
    return dict.fromkeys(("ours", "theirs"), TimedTask(task, arguments))


def compare(workers: turns.Workers, rounds: int, count: int) -> list[dict[str, Any]]:
    """Both sides, and ours beside decoders alone."""
    ours = {"ours": workers["ours"], "theirs": workers["ours"]}
    works: list[tuple[str, str, str, turns.Workers, Mapping[str, TimedTask]]] = [
        *((f"photographs, {kind}", "images/s", "transformers, fast", workers, _both("images", kind=kind, count=count))
          for kind in ("one size", "many sizes", "files")),
        ("a video, two frames a second", "frames/s", "transformers, decord", workers, _both("video", count=1)),
        *(("all frames of a video", "frames/s", f"{name} alone", ours,
           {"ours": TimedTask("decode", {"decoder": "ours"}), "theirs": TimedTask("decode", {"decoder": name})})
          for name in ("decord", "PyAV")),
    ]  # fmt: skip
    lines = []
    for what, unit, other, sides, work in works:
        (results,) = turns.measure(sides, [work], rounds)
        own, others = ([one[side]["seconds"] / one[side]["amount"] for one in results] for side in ("ours", "theirs"))
        aim = AIM if sides is workers else None
        line = {"what": what, "unit": unit, "other": other, **turns.compare(own, others, 1, aim)}
        digests = {one[side].get("digest") for one in results for side in one}
        line["equal"] = None if None in digests else len(digests) == 1
        lines.append(line | {"passed": line["passed"] and line["equal"] is not False})
    return lines


def scaling(worker: Callable[..., Any], rounds: int, count: int) -> list[dict[str, Any]]:
    """Images a second in one and two threads and processes, and what two bring."""
    lines = []
    for way in ("threads", "processes"):
        works = [TimedTask("scaled", {"way": way, "workers": workers, "count": count}) for workers in (2, 1)]
        pair = {"ours": worker, "theirs": worker}
        (results,) = turns.measure(pair, [dict(zip(pair, works, strict=True))], rounds)
        two, one = ([found[side]["seconds"] for found in results] for side in pair)
        lines.append({"way": way, **turns.compare(two, one, count, None)})
    return lines


def tables(figures: Mapping[str, Any]) -> Sequence[report.Table]:
    """Everything that was measured."""
    compared = [
        (
            line["what"], line["unit"], f"{line['ours']['median']:,.1f}", line["other"],
            f"{line['theirs']['median']:,.1f}", *report.judged(line),
        )
        for line in figures["lines"]
    ]  # fmt: skip
    scaled = [
        (line["way"], f"{line['theirs']['median']:.1f}", f"{line['ours']['median']:.1f}", *report.judged(line)[:1])
        for line in figures["scaling"]
    ]
    overlap = figures["overlap"]
    return (
        report.Table("preprocessing", ("what", "", "this package", "beside", "", "ratio", "aim", ""), compared),
        report.Table("images/s from files, one a call", ("workers", "one", "two", "ratio"), scaled),
        report.Table(
            "a training job's batch, ms",
            ("alone", "a step of a device", "both", "hidden"),
            [(*(f"{1e3 * overlap[name]:.0f}" for name in ("data", "step", "both")), f"{overlap['hidden']:.0%}")],
        ),
    )


def main() -> int:
    """Measure, print, write; 1 if an aim is missed."""
    parser = report.parser("bench.preprocess", __doc__)
    parser.add_argument("--rounds", type=int, default=5, help="measurements of each side, in turns")
    parser.add_argument("--tiny", action="store_true", help="one round of little; writes nothing")
    arguments = turns.parse(parser, Ours, Theirs)
    rounds, count = (1, 2) if arguments.tiny else (arguments.rounds, COUNT)
    with turns.start(turns.sides("bench.preprocess", arguments.threads)) as workers:
        figures: dict[str, Any] = {
            "rounds": rounds, "count": count, "cores": arguments.threads, "video": VIDEO,
            "lines": compare(workers, rounds, count), "scaling": scaling(workers["ours"], rounds, 2 * count),
            "overlap": workers["ours"]("overlap", batches=2 if arguments.tiny else BATCHES),
            "machine": turns.facts(workers),
        }  # fmt: skip
    overlap = figures["overlap"]
    # What of the shorter of both is not seen beside the longer.
    overlap["hidden"] = (overlap["data"] + overlap["step"] - overlap["both"]) / min(overlap["data"], overlap["step"])
    figures["passed"] = all(line["passed"] for line in figures["lines"])
    if arguments.tiny:
        report.console().print(*tables(figures))
        return 0
    return report.finish("preprocess", figures, *tables(figures))


if __name__ == "__main__":
    sys.exit(main())
