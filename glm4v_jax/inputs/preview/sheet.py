"""Drawings of what the model sees: an image with the grids of its patches and tokens, the frames of a video, a sheet.

All in numpy and Pillow, with Pillow's own font: the same drawing on every machine. Letters as in `preview`.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Literal

import numpy as np
import PIL.Image
import PIL.ImageDraw
import PIL.ImageFont

from glm4v_jax.inputs.preview.preview import Seen

WIDTH = 1180
"""Of a drawing, at most, in pixels."""
HEIGHTS = ((1, 880), (4, 560), (math.inf, 360))
"""(files on the sheet, height of the drawing of an image at most)."""
MAX_FRAMES = 120
"""Of a video; of more, this number is drawn, evenly spread."""

_LARGEST_SCALE = 4
_SMALLEST_TOKEN, _SMALLEST_PATCH = 6, 10
"""Lines closer than this, in pixels, would hide the image, and are left out."""
_COMFORTABLE_TOKEN = 24
"""Tokens of this many pixels are worth cutting a long image into strips for; closer lines are drawn thinner."""
_GAP = 14
_MARGIN = 28
_RULER = 26
_TILE_WIDTHS = ((2, 560), (12, 380), (30, 284), (60, 222), (math.inf, 184))
"""(temporal patches, width of the drawing of each at most)."""

_PAPER = (250, 250, 248)
_INK = (28, 30, 34)
_FAINT = (112, 116, 122)
_ALARM = (176, 58, 0)
_TEXT, _SMALL, _TITLE, _TIME = 15, 11, 22, 20


@dataclasses.dataclass(frozen=True)
class Card:
    """One file on the sheet.

    Attributes:
      title: the file's name.
      lines: what there is to say of it.
      warning: what there is to warn of.
      drawing: what the model sees.
    """

    title: str
    lines: Sequence[str]
    warning: str | None
    drawing: PIL.Image.Image


def draw_card(
    title: str, seen: Seen, time_texts: Sequence[str], lines: Sequence[str], warning: str | None, files: int
) -> Card:
    """Draw one of some files, an image or video, with lines under its title and a warning in another colour.

    `time_texts` are what the prompt says of each temporal patch of a video. A line about the grid is added.
    """
    if seen.kind == "video":
        drawing, legend = _draw_video(seen, time_texts)
    else:
        height = next(height for most, height in HEIGHTS if files <= most)
        drawing, legend = _draw_image(seen, height)
    return Card(title, [*lines, legend], warning, drawing)


def draw_sheet(cards: Sequence[Card]) -> PIL.Image.Image:
    """Put the drawings of all files under one another, each with its text."""
    width = max(760, *(card.drawing.width for card in cards))
    blocks = [_joined([_text_block(card, width), card.drawing], "down") for card in cards]
    height = sum(block.height + 2 * _MARGIN for block in blocks)
    sheet = PIL.Image.new("RGB", (width + 2 * _MARGIN, height), _PAPER)
    draw = PIL.ImageDraw.Draw(sheet)
    top = 0
    for block in blocks:
        if top:
            draw.line((_MARGIN, top, _MARGIN + width, top), fill=(214, 214, 210))
        sheet.paste(block, (_MARGIN, top + _MARGIN))
        top += block.height + 2 * _MARGIN
    return sheet


def draw_frames(seen: Seen, longest: int, most: int = MAX_FRAMES) -> tuple[dict[int, PIL.Image.Image], str]:
    """Draw an image, or each frame of a video by itself, between the lines of its tokens.

    A side has at most `longest` pixels; at most `most` temporal patches are drawn, evenly spread. Returns the number of
    the temporal patch -> drawing of its first frame; and what the lines are.
    """
    _, rows, columns = seen.token_grid
    scale = _whole(longest / max(seen.seen_width, seen.seen_height))
    shown = _evenly_spread(seen.grid_thw[0], most)
    grids = {index: _with_grid(_scaled(seen.frames[index, 0], scale), rows, columns, seen) for index in shown}
    token = seen.settings["patch_size"] * seen.settings["merge_size"]
    legend = _legend(token * scale, seen) + _drawn_of(len(shown), seen)
    return {index: PIL.Image.fromarray(pixels) for index, pixels in grids.items()}, legend


def _evenly_spread(count: int, most: int) -> list[int]:
    """At most `most` of `count` numbers from 0, the first and the last among them."""
    return sorted({round(i) for i in np.linspace(0, count - 1, min(count, most))})


def _drawn_of(drawn: int, seen: Seen) -> str:
    """What to add to a legend where not all temporal patches are drawn."""
    t = seen.grid_thw[0]
    return f"; {drawn} of {t} temporal patches drawn, evenly spread" if drawn < t else ""


def _font(size: int) -> PIL.ImageFont.FreeTypeFont | PIL.ImageFont.ImageFont:
    return PIL.ImageFont.load_default(size)


def _text_block(card: Card, width: int) -> PIL.Image.Image:
    written = [(card.title, _TITLE, _INK), *((line, _TEXT, _FAINT) for line in card.lines)]
    if card.warning:
        written.append((card.warning, _TEXT, _ALARM))
    rows = [(row, size, colour) for text, size, colour in written for row in _wrapped(text, size, width)]
    block = PIL.Image.new("RGB", (width, sum(round(1.4 * size) for _, size, _ in rows)), _PAPER)
    draw, top = PIL.ImageDraw.Draw(block), 0
    for row, size, colour in rows:
        draw.text((0, top), row, fill=colour, font=_font(size))
        top += round(1.4 * size)
    return block


def _wrapped(text: str, size: int, width: int) -> list[str]:
    """Rows of at most `width` pixels; a longer word is cut in the middle."""
    font, rows = _font(size), [""]
    for word in text.split(" "):
        if font.getlength(word) > width:
            keep = len(word)
            while font.getlength(word[: keep // 2] + "..." + word[-(keep // 2) :]) > width:
                keep -= 2
            word = word[: keep // 2] + "..." + word[-(keep // 2) :]
        longer = f"{rows[-1]} {word}" if rows[-1] else word
        if font.getlength(longer) <= width:
            rows[-1] = longer
        else:
            rows.append(word)
    return rows


def _draw_image(seen: Seen, height: int) -> tuple[PIL.Image.Image, str]:
    """An image in one piece, or cut into strips if it is very long; and what its lines are."""
    _, rows, columns = seen.token_grid
    pixels, token = seen.frames[0, 0], seen.settings["patch_size"] * seen.settings["merge_size"]
    down = rows > columns  # Strips are pieces of the longer side.
    long, short = max(rows, columns), min(rows, columns)
    room, across = (height, WIDTH) if down else (WIDTH, height)

    def pitch_of(strips: int) -> float:
        """Pixels of a token in the drawing."""
        along = (room - _RULER) / math.ceil(long / strips)
        return min(along, ((across + _GAP) / strips - _GAP - _RULER) / short)

    candidates = range(1, min(long, 12) + 1)
    strips = next((n for n in candidates if pitch_of(n) >= _COMFORTABLE_TOKEN), max(candidates, key=pitch_of))
    scale = _whole(pitch_of(strips) / token)
    size = math.ceil(long / strips)
    pieces = []
    for start in range(0, long, size):
        stop = min(start + size, long)
        first_row, last_row, first_column, last_column = (start, stop, 0, columns) if down else (0, rows, start, stop)
        piece = pixels[first_row * token : last_row * token, first_column * token : last_column * token]
        grid = _with_grid(_scaled(piece, scale), last_row - first_row, last_column - first_column, seen)
        pieces.append(_with_rulers(grid, first_row, last_row, first_column, last_column))
    legend = _legend(token * scale, seen)
    if scale != 1:
        legend += f"; drawn at {scale:.0%}"
    if len(pieces) > 1:
        legend += f"; cut into {len(pieces)} strips, {'left to right' if down else 'top to bottom'}"
    return _joined(pieces, "right" if down else "down"), legend


def _draw_video(seen: Seen, time_texts: Sequence[str]) -> tuple[PIL.Image.Image, str]:
    """The first frame of every temporal patch with its times, and the others of it small below."""
    shown = _evenly_spread(seen.grid_thw[0], MAX_FRAMES)
    widest = next(width for most, width in _TILE_WIDTHS if len(shown) <= most)
    token = seen.settings["patch_size"] * seen.settings["merge_size"]
    scale = _whole(widest / max(seen.seen_width, seen.seen_height))
    tiles = [_draw_tile(seen, index, time_texts[index], scale) for index in shown]
    across = max(1, (WIDTH + _GAP) // (tiles[0].width + _GAP))
    # As many in each row as evenly fills the rows that are needed anyway.
    across = math.ceil(len(tiles) / math.ceil(len(tiles) / across))
    rows = [_joined(tiles[start : start + across], "right") for start in range(0, len(tiles), across)]
    temporal = seen.settings["temporal_patch_size"]
    others = "the other frame of the pair" if temporal == 2 else f"the other frames of the {temporal} in a patch"
    legend = f"{_legend(token * scale, seen)}; large text: the time in the prompt; small image: {others}"
    return _joined(rows, "down"), legend + _drawn_of(len(shown), seen)


def _draw_tile(seen: Seen, index: int, time_text: str, scale: float) -> PIL.Image.Image:
    """One temporal patch: its first frame, the time in the prompt, real times, and its other frames."""
    _, rows, columns = seen.token_grid
    first, *others = seen.frames[index]
    largest = _with_grid(_scaled(first, scale), rows, columns, seen)
    small = [_scaled(other, scale * 0.3) for other in others]
    lines = [f"#{frame}  {seen.time(frame):.2f} s" for frame in seen.frame_indices[index]]
    line = round(1.35 * _SMALL)
    under = max(round(1.3 * _TIME) + line * len(lines), *(PIL.Image.fromarray(other).height for other in small))
    text_width = math.ceil(max(_font(_SMALL).getlength(text) for text in lines))
    text_width = max(text_width, math.ceil(_font(_TIME).getlength(time_text)))
    width = max(largest.shape[1], text_width + sum(other.shape[1] + 4 for other in small) + 4)
    tile = PIL.Image.new("RGB", (width, largest.shape[0] + 5 + under), _PAPER)
    tile.paste(PIL.Image.fromarray(largest), (0, 0))
    top, right = largest.shape[0] + 5, width
    for other in reversed(small):
        right -= other.shape[1]
        tile.paste(PIL.Image.fromarray(other), (right, top))
        right -= 4
    draw = PIL.ImageDraw.Draw(tile)
    draw.text((0, top - 3), time_text, fill=_INK, font=_font(_TIME))
    top += round(1.3 * _TIME)
    for text in lines:
        draw.text((0, top), text, fill=_FAINT, font=_font(_SMALL))
        top += line
    return tile


def _whole(scale: float) -> float:
    """A scale that repeats every pixel as often as the others, where it magnifies."""
    return min(math.floor(scale), _LARGEST_SCALE) if scale >= 1 else scale


def _scaled(pixels: np.ndarray, scale: float) -> np.ndarray:
    """An image [H, W, 3] in another size: whole pixels when it grows, smoothed when it shrinks."""
    height, width = (max(1, round(side * scale)) for side in pixels.shape[:2])
    resample = PIL.Image.Resampling.NEAREST if scale >= 1 else PIL.Image.Resampling.LANCZOS
    return np.array(PIL.Image.fromarray(np.ascontiguousarray(pixels)).resize((width, height), resample))


def _with_grid(pixels: np.ndarray, rows: int, columns: int, seen: Seen) -> np.ndarray:
    """A drawing [H, W, 3] with the borders of its rows x columns tokens, and of patches where there is room."""
    merge = seen.settings["merge_size"]
    pitch = pixels.shape[0] / rows
    draw_token_line = _double_line if pitch >= _COMFORTABLE_TOKEN else _contrasting_line
    # Dotted ones first: they would break the others where they cross.
    if pitch / merge >= _SMALLEST_PATCH:
        _draw_lines(pixels, rows * merge, columns * merge, _dotted_line, skip=merge)
    if pitch >= _SMALLEST_TOKEN:
        _draw_lines(pixels, rows, columns, draw_token_line)
    return pixels


def _draw_lines(
    pixels: np.ndarray, rows: int, columns: int, draw_line: Callable[[np.ndarray, int], None], skip: int | None = None
) -> None:
    """Draw the inner borders of rows x columns cells, all but every `skip`-th."""
    for axis, count in ((0, rows), (1, columns)):
        along = np.moveaxis(pixels, axis, 0)  # A view: what is drawn in it is drawn in `pixels`.
        for index in range(1, count):
            if skip is None or index % skip:
                draw_line(along, round(index * pixels.shape[axis] / count))


def _dotted_line(pixels: np.ndarray, place: int) -> None:
    """White and black in turn, so that it shows on whatever is below."""
    colour = np.where(np.arange(pixels.shape[1]) // 2 % 2, 255, 0)[:, None]
    pixels[place] = pixels[place] * 0.62 + colour * 0.38


def _double_line(pixels: np.ndarray, place: int) -> None:
    """White beside black, so that it shows on whatever is below."""
    pixels[place - 1] = pixels[place - 1] * 0.45
    pixels[place] = pixels[place] * 0.25 + 255 * 0.75


def _contrasting_line(pixels: np.ndarray, place: int) -> None:
    """One pixel wide, white where it is dark below and black where it is bright."""
    brightness = np.convolve(pixels[place].mean(axis=1), np.full(15, 1 / 15), mode="same")[:, None]
    pixels[place] = pixels[place] * 0.66 + np.where(brightness < 120, 255, 0) * 0.34


def _legend(pitch: float, seen: Seen) -> str:
    merge = seen.settings["merge_size"]
    if pitch < _SMALLEST_TOKEN:
        return "no lines: tokens are too small to draw"
    if pitch / merge < _SMALLEST_PATCH:
        return f"lines: tokens of {merge} x {merge} patches"
    return f"solid lines: tokens of {merge} x {merge} patches; dotted: patches"


def _with_rulers(
    pixels: np.ndarray, first_row: int, last_row: int, first_column: int, last_column: int
) -> PIL.Image.Image:
    """A drawing with the numbers of its rows and columns of tokens at the left and at the top."""
    height, width = pixels.shape[:2]
    image = PIL.Image.new("RGB", (width + _RULER, height + _RULER), _PAPER)
    image.paste(PIL.Image.fromarray(pixels), (_RULER, _RULER))
    draw, font = PIL.ImageDraw.Draw(image), _font(_SMALL)
    pitch = height / (last_row - first_row)
    step = next(step for step in (1, 2, 5, 10, 20, 50, 100, 200) if step * pitch >= 24)
    for row in range(-(-first_row // step) * step, last_row, step):
        draw.text((_RULER - 6, _RULER + (row - first_row + 0.5) * pitch), str(row), _FAINT, font, anchor="rm")
    for column in range(-(-first_column // step) * step, last_column, step):
        place = _RULER + (column - first_column + 0.5) * pitch
        draw.text((place, _RULER - 6), str(column), _FAINT, font, anchor="ms")
    return image


def _joined(images: Sequence[PIL.Image.Image], towards: Literal["right", "down"]) -> PIL.Image.Image:
    """Images beside or under one another, with gaps between them."""
    along = 0 if towards == "right" else 1
    size = [max(image.size[axis] for image in images) for axis in (0, 1)]
    size[along] = sum(image.size[along] + _GAP for image in images) - _GAP
    joined = PIL.Image.new("RGB", (size[0], size[1]), _PAPER)
    place = [0, 0]
    for image in images:
        joined.paste(image, (place[0], place[1]))
        place[along] += image.size[along] + _GAP
    return joined
