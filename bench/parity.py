"""Number for number like transformers 4.57.1? A table with a verdict for every line.

    python -m bench.parity

Models are tiny and random, float32, eager on the reference's side; images are real photographs, videos real ones.
Inputs of the model are the reference's own, so that a line blames the processor or the model and not both. Writes
`bench/results/parity.json`; exits with status 1 if a line fails.
"""

import dataclasses
import pathlib
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import PIL.Image

from bench import media, models, reference, report
from bench.parity_options import (
    MAX_LOGIT_DIFFERENCE,
    NEW_TOKENS,
    Arrays,
    OptionLine,
    compare_beams,
    compare_options,
)
from glm4v_jax import Glm4vForConditionalGeneration, Glm4vProcessor
from tests.reference import CONFIGS, Prompts, to_torch

MAX_PIXEL_DIFFERENCE = 1e-6
MAX_VIDEO_STEPS = 1
WORDS = "the cat and a man on his bicycle passed seven red houses before it rained again in Tübingen, 猫!"
NOISE: list[list[Any]] = [
    [20, ("image", (4, 6)), 7, ("image", (6, 4)), 3], [40], [500, ("image", (8, 2)), ("image", (2, 12)), 5],
]  # fmt: skip
"""Prompts, as `Prompts` takes them, for models without a processor."""

Conversation = list[dict[str, Any]]


@dataclasses.dataclass
class ModelLine:
    """One batch through both models."""

    case: str
    prompts: int
    tokens: int
    patches: int
    inputs_equal: bool | None
    """token ids, attention mask and grids of both processors; None where there was no processor"""
    positions_equal: bool
    logit_difference: float
    """largest, relative to the largest magnitude, over real tokens"""
    greedy_equal: int
    """new tokens that are the same"""
    greedy_tokens: int
    distinct_tokens: int
    smallest_margin: float
    """between the first and the second choice of all steps, relative as above: equality below it would mean nothing"""

    @property
    def passed(self) -> bool:
        """Whether everything agrees, and the greedy tokens could have disagreed."""
        return (
            self.inputs_equal is not False
            and self.positions_equal
            and self.logit_difference <= MAX_LOGIT_DIFFERENCE
            and self.greedy_equal == self.greedy_tokens
            and self.distinct_tokens > 1
            and self.smallest_margin > self.logit_difference
        )


@dataclasses.dataclass
class PixelLine:
    """One image or video through both processors."""

    case: str
    size: tuple[int, ...]
    """as stored: height and width, frames first"""
    grid: list[int]
    grids_equal: bool
    resize_steps: int
    """largest difference after the resize, of 255"""
    pixel_difference: float
    """largest difference of what the model gets"""
    max_steps: int
    max_difference: float

    @property
    def passed(self) -> bool:
        """Whether both are within their limits."""
        return self.grids_equal and self.resize_steps <= self.max_steps and self.pixel_difference <= self.max_difference


def _user(*content: dict[str, Any]) -> Conversation:
    return [{"role": "user", "content": list(content)}]


def _text(text: str) -> dict[str, Any]:
    return {"type": "text", "text": text}


def _crop(name: str, box: tuple[int, int, int, int]) -> dict[str, Any]:
    with PIL.Image.open(media.photograph(name)) as image:
        return {"type": "image", "image": image.convert("RGB").crop(box)}


def _video(name: str) -> dict[str, Any]:
    return {"type": "video", "path": str(media.video(name))}


def _long_text(words: int) -> str:
    rng = np.random.default_rng(0)
    return " ".join(rng.choice(WORDS.split(), words))


def cases() -> Iterator[tuple[str, list[Conversation], str]]:
    """Name, conversations, padding side of each batch."""
    short = _user(_text("What is the capital of France?"))
    wide = _user(_crop("rocket.jpg", (0, 100, 640, 220)), _text("Describe this image."))
    tall = _user(_text("Who is"), _crop("astronaut.png", (150, 0, 270, 512)), _text("this?"))
    three = _user(
        _crop("chelsea.png", (0, 0, 300, 200)), _crop("coffee.png", (100, 50, 260, 330)), _text("and"),
        _crop("retina.jpg", (300, 300, 500, 500)), _text("- which of these can be eaten?"),
    )  # fmt: skip
    yield "text, short", [short], "left"
    yield "text, 600 tokens", [_user(_text(_long_text(250)))], "left"
    yield "image, wide", [wide], "left"
    yield "image, tall", [tall], "left"
    yield "three images", [three], "left"
    yield "one video", [_user(_video("carphone_pristine.mp4"), _text("Describe this video."))], "left"
    yield (
        "two videos",
        [_user(_video("carphone_distorted.mp4"), _text("and"), _video("bikes.mp4"), _text("- which is sharper?"))],
        "left",
    )
    mixed = [short, three, _user(_text(_long_text(40))), wide]
    yield "texts and images, padded left", mixed, "left"
    yield "texts and images, padded right", mixed, "right"


def compare_case(
    name: str,
    conversations: Sequence[Conversation],
    side: str,
    processors: tuple[Any, Any],
    models: tuple[Any, Any],
    **options: Any,
) -> ModelLine:
    """Conversations through both processors and both models; both pairs are (the reference's, this package's)."""
    theirs, ours = (_prepare(processor, conversations, side) for processor in processors)
    equal = theirs.keys() == ours.keys() and all(
        np.array_equal(theirs[key], ours[key]) for key in theirs if not key.startswith("pixel_values")
    )
    # The reference continues from the last column, which is padding if that is on the right: its prompts stay left.
    left = theirs if side == "left" else _prepare(processors[0], conversations, "left")
    return compare_models(name, models, theirs, generate_from=left, inputs_equal=equal, **options)


def _prepare(processor: Any, conversations: Sequence[Conversation], side: str) -> Arrays:
    processor.tokenizer.padding_side = side
    options = {"return_tensors": "np"} if isinstance(processor, Glm4vProcessor) else {"return_tensors": "pt"}
    return reference.to_numpy(
        processor.apply_chat_template(
            list(conversations), add_generation_prompt=True, tokenize=True, return_dict=True, padding=True, **options
        )
    )


def compare_models(
    name: str,
    models: tuple[Any, Any],
    inputs: Arrays,
    *,
    generate_from: Arrays | None = None,
    inputs_equal: bool | None = None,
    new_tokens: int = NEW_TOKENS,
) -> ModelLine:
    """The same arrays through both models, (the reference's, this package's)."""
    import torch

    theirs, ours = models
    mask = inputs["attention_mask"] == 1
    grids = {key: inputs.get(key) for key in ("image_grid_thw", "video_grid_thw")}
    tensors = to_torch(inputs)
    with torch.no_grad():
        expected = theirs(**tensors).logits.numpy()
        positions, deltas = theirs.model.get_rope_index(
            tensors["input_ids"], *(tensors.get(key) for key in grids), attention_mask=tensors["attention_mask"]
        )
        generated = theirs.generate(
            **to_torch(inputs if generate_from is None else generate_from),
            max_new_tokens=new_tokens, output_logits=True, return_dict_in_generate=True,
        )  # fmt: skip
    found = np.asarray(ours(**inputs).logits)
    scale = float(np.abs(expected[mask]).max())
    our_positions, our_deltas = ours.model.get_rope_index(inputs["input_ids"], **grids, attention_mask=mask)
    expected_ids = generated.sequences.numpy()[:, -new_tokens:]
    ids = ours.generate(**inputs, max_new_tokens=new_tokens, eos_token_id=-1, do_sample=False)[:, -new_tokens:]
    best = torch.stack(generated.logits).topk(2).values.numpy()
    return ModelLine(
        case=name,
        prompts=len(mask),
        tokens=int(mask.sum()),
        patches=sum(len(inputs[key]) for key in ("pixel_values", "pixel_values_videos") if key in inputs),
        inputs_equal=inputs_equal,
        positions_equal=np.array_equal(positions.numpy(), our_positions) and np.array_equal(deltas.numpy(), our_deltas),
        logit_difference=float(np.abs(found - expected)[mask].max()) / scale,
        greedy_equal=int((ids == expected_ids).sum()),
        greedy_tokens=expected_ids.size,
        distinct_tokens=len(np.unique(expected_ids)),
        smallest_margin=float((best[..., 0] - best[..., 1]).min()) / scale,
    )


def compare_image(name: str, processors: tuple[Any, Any]) -> PixelLine:
    """A photograph through both image processors; what is between the resize and the model is exact."""
    with PIL.Image.open(media.photograph(name)) as file:
        image = file.convert("RGB")

    def process(processor: Any, **options: Any) -> Arrays:
        return reference.to_numpy(processor.image_processor(images=[image], return_tensors="np", **options))

    grid, line = _compare_pixels(process, processors, "pixel_values", "image_grid_thw")
    return PixelLine(name, (image.height, image.width), grid, *line, 0, MAX_PIXEL_DIFFERENCE)


def compare_video(name: str, processors: tuple[Any, Any]) -> PixelLine:
    """A video through both video processors, from the file on."""
    path = str(media.video(name))

    def process(processor: Any, **options: Any) -> Arrays:
        tensors = "np" if isinstance(processor, Glm4vProcessor) else "pt"
        kept = processor.video_processor(videos=[path], do_sample_frames=True, return_tensors=tensors, **options)
        return reference.to_numpy({key: kept[key] for key in ("pixel_values_videos", "video_grid_thw")})

    import decord

    frames = decord.VideoReader(path)
    size = (len(frames), *frames[0].shape[:2])
    grid, line = _compare_pixels(process, processors, "pixel_values_videos", "video_grid_thw")
    # One step of 255 in units of the smallest standard deviation.
    step = MAX_VIDEO_STEPS / 255 / min(processors[1].video_processor.image_std)
    return PixelLine(name, size, grid, *line, MAX_VIDEO_STEPS, step + MAX_PIXEL_DIFFERENCE)


def _compare_pixels(
    process: Callable[..., Arrays], processors: tuple[Any, Any], values: str, grid: str
) -> tuple[list[int], tuple[bool, int, float]]:
    """The grid; whether it is the same; largest difference after the resize, in steps of 255; and in the end."""
    theirs, ours = (process(processor) for processor in processors)
    resized = [process(processor, do_rescale=False, do_normalize=False)[values] for processor in processors]
    if theirs[values].shape != ours[values].shape:
        return ours[grid][0].tolist(), (False, 255, float("inf"))
    steps = np.abs(resized[0].astype(np.float64) - resized[1].astype(np.float64)).max()
    difference = float(np.abs(theirs[values] - ours[values]).max())
    return ours[grid][0].tolist(), (np.array_equal(theirs[grid], ours[grid]), int(np.ceil(steps)), difference)


def load_models(directory: pathlib.Path) -> tuple[Any, Any]:
    """(The reference's model, this package's)."""
    return reference.load_model(directory), Glm4vForConditionalGeneration.from_pretrained(directory)


def compare_configs(
    directory: pathlib.Path, names: Sequence[str] = tuple(CONFIGS), **options: Any
) -> Iterator[ModelLine]:
    """Models of several shapes on noise."""
    for name in names:
        path = models.write_checkpoint(directory / name, CONFIGS[name])
        pair = load_models(path)
        inputs = Prompts(pair[1].config, NOISE).inputs
        yield compare_models(f"configuration {name!r}", pair, inputs, **options)


def tables(figures: Mapping[str, Any]) -> list[report.Table]:
    """Models, options, images and videos."""
    models = [
        (
            line["case"], line["prompts"], f"{line['tokens']:,}", f"{line['patches']:,}",
            {None: "", True: "equal", False: "DIFFER"}[line["inputs_equal"]],
            "equal" if line["positions_equal"] else "DIFFER", f"{line['logit_difference']:.1e}",
            f"{line['greedy_equal']}/{line['greedy_tokens']}", line["distinct_tokens"],
            f"{line['smallest_margin']:.1e}", report.verdict(line["passed"]),
        )
        for line in figures["models"]
    ]  # fmt: skip
    options = [
        (
            line["case"], f"{line['tokens_equal']}/{line['tokens']}", f"{line['score_difference']:.1e}",
            f"{line['logit_difference']:.1e}", report.verdict(line["passed"]),
        )
        for line in figures["options"]
    ]  # fmt: skip
    images, videos = (
        [
            (
                line["case"], " x ".join(map(str, line["size"])), " x ".join(map(str, line["grid"])),
                line["resize_steps"], f"{line['pixel_difference']:.1e}", report.verdict(line["passed"]),
            )
            for line in figures[kind]
        ]
        for kind in ("images", "videos")
    )  # fmt: skip
    largest = f"{MAX_LOGIT_DIFFERENCE:g}"
    pixels = ("size", "grid", "steps of 255", "difference", "")
    return [
        report.Table(
            f"model: logits within {largest} of the largest, {NEW_TOKENS} greedy tokens equal",
            (
                "case", "prompts", "tokens", "patches", "ids, grids", "M-RoPE", "logits", "greedy", "distinct",
                "margin", "",
            ),
            models,
        ),
        report.Table(
            f"options: tokens as the reference's, streamed too; scores and logits within {largest}",
            ("case", "tokens", "scores", "logits", ""), options,
        ),
        report.Table(
            f"images: equal after the resize, then within {MAX_PIXEL_DIFFERENCE:g}", ("photograph", *pixels), images
        ),
        report.Table(f"videos: within {MAX_VIDEO_STEPS} step of 255 after the resize", ("video", *pixels), videos),
    ]  # fmt: skip


def _as_json(lines: Sequence[Any]) -> list[Mapping[str, Any]]:
    return [{**dataclasses.asdict(line), "passed": line.passed} for line in lines]


def main() -> int:
    """Compare, print, write; 1 if a line fails."""
    parser = report.parser("bench.parity", __doc__)
    parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="glm4v_jax_parity_") as name:
        directory = pathlib.Path(name)
        path = models.write_checkpoint(directory / "packaged", models.PACKAGED, processor=True)
        processors, pair = (reference.load_processor(path), Glm4vProcessor.from_pretrained(path)), load_models(path)
        lines = [compare_case(*case, processors, pair) for case in cases()]
        lines += compare_configs(directory)
        tall = next(conversations for name, conversations, _ in cases() if name == "image, tall")
        inputs, tokenizers = _prepare(processors[0], tall, "left"), tuple(each.tokenizer for each in processors)
        options = list(compare_options(pair, inputs, tokenizers))
        mixed = next(conversations for name, conversations, _ in cases() if name == "texts and images, padded left")
        options += compare_beams(pair, _prepare(processors[0], mixed, "left"))
        images = [compare_image(name, processors) for name in media.PHOTOGRAPHS]
        videos = [compare_video(name, processors) for name in media.VIDEOS]
    judged: list[ModelLine | OptionLine | PixelLine] = [*lines, *options, *images, *videos]
    passed = all(line.passed for line in judged)
    figures = {
        "machine": report.machine_facts("transformers", "torch", "jax", "numpy", "pillow"),
        "models": _as_json(lines), "options": _as_json(options),
        "images": _as_json(images), "videos": _as_json(videos),
        "passed": passed,
    }  # fmt: skip
    largest = max(line.logit_difference for line in lines)
    end = f"largest difference of logits {largest:.1e}; {'all lines pass' if passed else 'SOME LINES FAIL'}"
    return report.finish("parity", figures, *tables(figures), end)


if __name__ == "__main__":
    sys.exit(main())
