"""Parse the whole text that a model wrote: its answer, and in it a letter, a number, boxes or points.

What cannot be parsed is None: never an error, never a zero. Nothing here evaluates what a model wrote, and every
function takes time in proportion to the length of the text, whatever is in it.
"""

import itertools
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Literal

from glm4v_jax.errors import DataError
from glm4v_jax.generate.text.boxes import SCALE, find_boxes, find_points
from glm4v_jax.generate.text.thinking import parse

Box = tuple[float, float, float, float]
Point = tuple[float, float]
Scale = Literal["thousand", "unit", "pixel"]
"""The unit of coordinates in an answer: thousandths of width and height, as GLM-4.1V writes them; fractions from 0 to
1, for which other harnesses' prompts ask; pixels of the original image."""

LIMITS: Mapping[Scale, float] = {"thousand": SCALE, "unit": 1.0, "pixel": math.inf}
"""The largest coordinate of each scale."""

LATEX_BOX = "\\boxed{"
_LATEX_TEXT = re.compile(r"\\(?:text|textbf|mathrm|mathbf)\s*\{([^{}]*)\}")

FULL_WIDTH: Mapping[int, int | str] = {0xFF01 + i: 0x21 + i for i in range(94)} | {0x3000: " "}
"""Full-width forms of ASCII and the ideographic space -> ASCII, for `str.translate`."""
_ASCII = {**FULL_WIDTH, 0x2212: "-"}  # the minus sign

_NUMBER = re.compile(
    r"(?<![0-9A-Za-z_])"
    r"((?:(?<![)\]])[-+])?)"
    r"((?:[0-9]{1,3}(?:,[0-9]{3}(?![0-9]))++|[0-9]++)(?:\.[0-9]*+)?|\.[0-9]++)"
    r"((?:[eE][-+]?[0-9]++)?)"
    r"(?:\s?/\s?([0-9]++(?:\.[0-9]++)?))?"
)
LONGEST_NUMBER = 400
"""Characters; more digits than a float has."""
_CHINESE = "\u2e80"
"""The first character of scripts in which a character is a word of its own."""

_LETTER = r"([A-Za-z])"
# In a sentence a small letter may be an article, so something has to end it.
_STATED = r"(?-i:([A-Z])(?![A-Za-z'])|([a-z])(?=\s*(?:[).,;*\"']|$)))"
_ONLY_LETTER = re.compile(rf"[\s(\[*$\"']*{_LETTER}[\s)\].:,;*$\"']*")
_FIRST_LETTER = re.compile(rf"\s*(?:[(\[*]{{1,3}}{_LETTER}[)\]*]{{1,3}}|{_LETTER}[).:])[.:*]{{0,3}}(?:\s|$)")
_STATED_LETTER = re.compile(
    rf"(?:answer|option|choice)(?:\s+is|\s*:)?[\s*]{{0,4}}:?[\s*(\[\"']{{0,4}}{_STATED}"
    rf"|(?:答案|选项|选)[是为]?[:\s*(]{{0,4}}{_STATED}",
    re.IGNORECASE,
)
_WORDS = re.compile(r"[^\s.()\[\],:;!*#{}?\"']+")


def answer_text(text: str) -> str | None:
    """Return the inside of `<answer>`, without box tags; the text outside the thought where there is no such tag.

    None where that is empty, as in a text that was cut off in its thought.

    >>> answer_text("<think>8?</think><answer>It is <|begin_of_box|>7<|end_of_box|>.</answer>")
    'It is 7.'
    """
    return parse(text).answer or None


def final_answer(text: str) -> str | None:
    r"""Return what is compared: the inside of the box, else `answer_text`; without whitespace around it.

    The model was trained to write one box at most; of several the first one counts, as in VLMEvalKit's class for this
    model. `\boxed{...}` is a box too, where there is no other one or within it. None where nothing is left.

    >>> final_answer("<think>8?</think><answer>It is <|begin_of_box|>7<|end_of_box|>.</answer>")
    '7'
    """
    parsed = parse(text)
    found = next((box for box in parsed.boxed if box), parsed.answer)
    return _inside_latex_box(found).strip() or None


def _inside_latex_box(text: str) -> str:
    r"""The inside of the first `\boxed{...}`, which may lack its end; else the text as it is."""
    start = text.find(LATEX_BOX)
    if start < 0:
        return text
    start += len(LATEX_BOX)
    depth = 1
    for index in range(start, len(text)):
        depth += (text[index] == "{") - (text[index] == "}")
        if depth == 0:
            return text[start:index]
    return text[start:]


def choice(text: str, options: Mapping[str, str] | Sequence[str]) -> str | None:
    """Return the letter of the chosen option, as written in `options`; None where that is not clear.

    The final answer is read in this order, and the first reading that finds exactly one option counts:

    1. it is a letter: "B", "(B)", "**B.**", "$B$";
    2. it begins with one: "(B) red", "B. red", "**B**: red";
    3. it says so: "the answer is B", "option (B)", "答案是B"; of several places the last;
    4. it is the text of an option, whatever the case and whitespace;
    5. one option's letter stands in it as a word, a capital one; "A" and "I" before a small letter are English;
    6. the text of one option stands in it, with no letter or digit around it.

    The last two are those of VLMEvalKit (`can_infer`) made stricter; `eval.metrics.choices` has the originals.

    >>> choice("The answer is (B).", {"A": "red", "B": "blue"})
    'B'

    Args:
        text: all that was generated.
        options: letter -> text, or the texts of A, B, C, ...
    """
    answer = final_answer(text)
    if answer is None:
        return None
    named = by_letter(options)
    answer = _LATEX_TEXT.sub(r"\1", answer.translate(_ASCII))
    for match in (_ONLY_LETTER.fullmatch(answer), _FIRST_LETTER.match(answer)):
        if match and (letter := _known(match, named)):
            return letter
    stated = [letter for match in _STATED_LETTER.finditer(answer) if (letter := _known(match, named))]
    if stated:
        return stated[-1]
    plain = _plain(answer)
    for found in (
        [letter for letter, option in named.items() if _plain(option) == plain],
        _letters_as_words(answer, named),
        [letter for letter, option in named.items() if _stands_in(_plain(option), plain)],
    ):
        if len(found) == 1:
            return found[0]
    return None


def by_letter(options: Mapping[str, str] | Sequence[str]) -> dict[str, str]:
    """Return options as letter -> text: as given, or A, B, C, ... for a sequence of texts."""
    if isinstance(options, Mapping):
        return {str(letter): str(option) for letter, option in options.items()}
    return {chr(ord("A") + index): str(option) for index, option in enumerate(options)}


def _known(match: re.Match[str], options: Mapping[str, str]) -> str | None:
    letter = next(group for group in match.groups() if group)
    return next((name for name in options if name.casefold() == letter.casefold()), None)


def _plain(text: str) -> str:
    return " ".join(text.translate(_ASCII).casefold().split()).strip(" .")


def _letters_as_words(text: str, options: Mapping[str, str]) -> list[str]:
    """The options whose letters stand in a text as words; none if all of them may be articles."""
    words = _WORDS.findall(text)
    found = {word for word in words if word in options}
    certain = {
        word
        for word, after in itertools.pairwise([*words, ""])
        if word not in ("A", "a", "I") or not after[:1].islower()
    }
    return [letter for letter in options if letter in found] if found & certain else []


def _stands_in(option: str, text: str) -> bool:
    if not option:
        return False
    start = text.find(option)
    while start >= 0:
        around = text[max(start - 1, 0) : start], text[start + len(option) : start + len(option) + 1]
        if not any(character.isalnum() and character < _CHINESE for character in around):
            return True
        # Skips what was found, so that the time stays linear; an overlapping second match would begin in a word.
        start = text.find(option, start + len(option))
    return False


def numbers(text: str) -> list[float]:
    """Return the numbers in a plain text, in the order written, all of them finite.

    With or without thousands commas, decimals, an exponent, a sign; "3/4" is 0.75, and "2007-2008" are two numbers.
    Digits in a word ("A4", "x2"), units, currencies and per cent signs are skipped.
    """
    found = []
    for sign, digits, exponent, divisor in _NUMBER.findall(text.translate(_ASCII)):
        if len(digits) + len(exponent) + len(divisor) > LONGEST_NUMBER:
            continue
        value = float(f"{sign}{digits.replace(',', '')}{exponent}")
        if divisor:
            value = value / float(divisor) if float(divisor) else math.inf
        if math.isfinite(value):
            found.append(value)
    return found


def number(text: str) -> float | None:
    """Return the number of the final answer, as `numbers` reads it; None where there is none, or different ones."""
    found = set(numbers(_LATEX_TEXT.sub(r"\1", final_answer(text) or "")))
    return found.pop() if len(found) == 1 else None


def boxes(text: str, scale: Scale = "thousand") -> list[Box] | None:
    """Return the boxes (x1, y1, x2, y2) that the answer names, on its own scale; None where it names none.

    Four numbers in brackets of any style, none of which is beyond the scale; see `generate.text.boxes.find_boxes`.
    """
    return find_boxes(text, LIMITS[scale]) or None


def points(text: str, scale: Scale = "thousand") -> list[Point] | None:
    """Return the points (x, y) that the answer names, two numbers in brackets, on its own scale; None without any."""
    return find_points(text, LIMITS[scale]) or None


def to_pixels(
    found: Iterable[Sequence[float]], width: float, height: float, scale: Scale = "thousand"
) -> list[tuple[float, ...]]:
    """Convert boxes, or points, to pixels of the image, unrounded as harnesses compare them.

    Args:
        found: (x1, y1, x2, y2) or (x, y), on `scale`.
        width, height: of the original image, in pixels.
        scale: of the coordinates; it is not guessed from the numbers.

    Returns:
        Each clipped to the image and, for a box, with its corners in order; the box may be empty.

    Raises:
        DataError: width or height is not above 0.
    """
    if not (width > 0 and height > 0):
        raise DataError(f"width, height: found {width}, {height}; expected numbers of pixels above 0")
    sizes = (width, height)
    pixels = []
    for coordinates in found:
        scaled = [
            min(max(value if scale == "pixel" else value / LIMITS[scale] * sizes[axis % 2], 0.0), sizes[axis % 2])
            for axis, value in enumerate(coordinates)
        ]
        xs, ys = sorted(scaled[::2]), sorted(scaled[1::2])
        pixels.append(tuple(value for corner in zip(xs, ys, strict=True) for value in corner))
    return pixels
