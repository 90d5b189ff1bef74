"""`glm4v inspect`: what the model will see of images and videos, as a sheet, and how many tokens that takes."""

import contextlib
import dataclasses
import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from glm4v_jax.console.drawings import check_png, write_png
from glm4v_jax.console.options import DEFAULT_MODEL, DEFAULT_MODEL_HINT, check_files, find_model
from glm4v_jax.console.program import JsonOptions
from glm4v_jax.console.progress import status
from glm4v_jax.errors import MediaError
from glm4v_jax.files import to_json
from glm4v_jax.inputs.media.quiet import silent_decoders

if TYPE_CHECKING:
    import PIL.Image

    from glm4v_jax.inputs.preview.placement import PlacedPrompt

MAX_FILES = 100


@dataclasses.dataclass(kw_only=True)
class Inspect(JsonOptions):
    """Show what the model will see of images and videos.

    Writes one PNG with the grids of their patches and tokens, and prints sizes, tokens, M-RoPE positions, and how much
    was scaled down. No weights are loaded.
    """

    files: Annotated[tyro.conf.Positional[tuple[str, ...]], tyro.conf.arg(metavar="FILE...", help_behavior_hint="")]
    """Images and videos: paths or http(s) addresses; a directory is a video of its images."""

    model: Annotated[str, tyro.conf.arg(metavar="DIR|NAME", help_behavior_hint=DEFAULT_MODEL_HINT)] = DEFAULT_MODEL
    """Checkpoint whose processor is used."""

    out: Annotated[str, tyro.conf.arg(metavar="PNG")] = "inspect.png"
    """The sheet to write. An earlier sheet is overwritten; another file is not, unless --overwrite."""

    overwrite: bool = False
    """Overwrite any file."""

    prompt: Annotated[str | None, tyro.conf.arg(metavar="TEXT")] = None
    """A prompt about the files: count the tokens of the whole prompt."""

    def run(self) -> None:
        """Read all files, and only then draw, write the sheet and print."""
        if not self.files:
            raise MediaError("FILE: found none; expected at least one image or video")
        if len(self.files) > MAX_FILES:
            raise MediaError(f"FILE: found {len(self.files)}; expected at most {MAX_FILES} for one sheet")
        self.model = find_model(self.model)
        check_files("FILE", self.files, directories=True)
        check_png("--out", self.out, self.files, overwrite=self.overwrite)

        from glm4v_jax.inputs.preview.placement import facts, place_in_prompt
        from glm4v_jax.inputs.preview.preview import look
        from glm4v_jax.inputs.preview.sheet import draw_card, draw_sheet
        from glm4v_jax.inputs.processor import Glm4vProcessor

        processor = Glm4vProcessor.from_pretrained(self.model)
        seen = []
        with silent_decoders() if not self.verbose else contextlib.nullcontext():
            for place in self.files:
                with status(f"reading {place}"):
                    seen.append(look(place, processor))
        prompt = place_in_prompt(seen, processor, self.prompt)
        all_facts = [facts(item, place) for item, place in zip(seen, prompt.places, strict=True)]
        with status("drawing"):
            cards = [
                draw_card(_title(item.name), item, place.time_texts, sheet_lines(fact), fact["warning"], len(seen))
                for item, place, fact in zip(seen, prompt.places, all_facts, strict=True)
            ]
            sheet = draw_sheet(cards)
            write_png(sheet, self.out)
        if self.as_json:
            print(to_json(self._as_object(all_facts, prompt, sheet)))
        else:
            self._print(all_facts, prompt, sheet)

    def _as_object(
        self, all_facts: Sequence[dict[str, Any]], prompt: "PlacedPrompt", sheet: "PIL.Image.Image"
    ) -> dict[str, Any]:
        return {
            "files": list(all_facts),
            "prompt": {
                "text": self.prompt,
                "tokens": len(prompt.input_ids),
                "positions": [0, prompt.next_position - 1],
                "next_position": prompt.next_position,
            },
            "sheet": {"file": self.out, "width": sheet.width, "height": sheet.height},
            "model": self.model,
        }

    def _print(self, all_facts: Sequence[dict[str, Any]], prompt: "PlacedPrompt", sheet: "PIL.Image.Image") -> None:
        for fact in all_facts:
            print(f"{fact['file']} ({'video' if fact['kind'] == 'video' else 'image'})")
            for name, value in rows(fact):
                print(f"  {name:<10}{value}")
            print()
        if self.prompt is not None:
            largest = prompt.next_position - 1
            tokens = _count(len(prompt.input_ids), "token")
            print(f"prompt: {tokens}, M-RoPE 0 to {largest}; the answer starts at {largest + 1}")
        print(f"sheet: {self.out} ({sheet.width} × {sheet.height} pixels)")


def rows(fact: dict[str, Any]) -> list[tuple[str, str]]:
    """The lines about a file, as (name, text), from `inputs.preview.placement.facts`; width before height."""
    t, h, w = fact["grid_thw"]
    scale = f"× {fact['scale_width']:.3f} wide, × {fact['scale_height']:.3f} high"
    seen = f"{fact['seen_width']} × {fact['seen_height']} pixels"
    lines = [("original", f"{fact['width']} × {fact['height']} pixels")]
    if fact["kind"] == "video":
        fps, duration = fact["fps"], fact["duration"]
        taken, seconds = fact["frames_indices"], fact["frames_seconds"]
        frames = _count(fact["frames"], "frame")
        lines[0] = ("original", f"{lines[0][1]}, {frames}, {fps:.4g} per second, {duration:.2f} s")
        times = f"from {seconds[0]:.2f} to {seconds[-1]:.2f} s"
        lines.append(("sampled", f"{_count(len(taken), 'frame')}, {times}; {_count(t, 'temporal patch')}"))
        if len(taken) > len(set(taken)):
            why = "too short for a second sample" if len(set(taken)) == 1 else "frames are taken in pairs"
            lines.append(("note", f"the last frame is taken twice: {why}"))
        lines.append(("times", f"{', '.join(_shortened(fact['time_texts']))} in the prompt"))
    lines.append(("seen", seen if fact["why"] == "as it is" else f"{seen}: {scale}; {fact['why']}"))
    lines.append(("grid_thw", f"{t} × {h} × {w} = {_count(fact['patches'], 'patch')}"))
    share = f"{fact['share_of_budget']:.1%} of the budget of {fact['budget_tokens']}"
    lines.append(
        ("tokens", f"{_count(fact['image_tokens'], 'image token')}, {share}; {fact['prompt_tokens']} of the prompt")
    )
    positions = ", ".join(
        f"{axis} {first} to {last}" if first != last else f"{axis} {first}"
        for axis, (first, last) in fact["positions"].items()
    )
    lines.append(("M-RoPE", positions))
    if fact["warning"]:
        lines.append(("warning", fact["warning"]))
    return lines


def sheet_lines(fact: dict[str, Any]) -> list[str]:
    """The lines for the sheet, whose font has few characters."""
    lines = {name: value.replace("×", "x") for name, value in rows(fact)}
    sampled = [f"sampled: {lines['sampled']}"] if "sampled" in lines else []
    return [
        f"original: {lines['original']}",
        *sampled,
        f"seen: {lines['seen']}",
        f"{lines['tokens']};  grid_thw {lines['grid_thw']}",
        f"M-RoPE: {lines['M-RoPE']}",
    ]


def _title(name: str) -> str:
    """Return the last part of a path or address."""
    return os.path.basename(name) or name


def _shortened(times: Sequence[str]) -> list[str]:
    """Return the first and the last of many."""
    return list(times) if len(times) <= 12 else [*times[:8], "...", *times[-3:]]


def _count(number: int, name: str) -> str:
    plural = "es" if name.endswith("ch") else "s"
    return f"{number} {name}{plural if number != 1 else ''}"
