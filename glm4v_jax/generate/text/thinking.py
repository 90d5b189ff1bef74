"""What a generated text consists of: thought, answer, and what the answer puts in a box.

GLM-4.1V writes `<think>…</think>`, then `<answer>… <|begin_of_box|>FINAL<|end_of_box|> …</answer>`. `</answer>` ends a
generation, so the last tag is usually missing, and a cut text misses more. Later models write no tags around their
answer (`config.thinking.THINKING`). `ThinkingParser` reads a text piece by piece while it is written, `parse` a
finished one; both are the same machine.
"""

import dataclasses
import enum
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

from glm4v_jax.config.thinking import ANSWER, END_ANSWER, END_THINK, THINK, THINKING, ThinkingFormat

if TYPE_CHECKING:  # help of commands does not wait for them
    import numpy as np

    from glm4v_jax.inputs.text.tokenizer import Glm4vTokenizer

BOX, END_BOX = "<|begin_of_box|>", "<|end_of_box|>"

TAGS = (THINK, END_THINK, ANSWER, END_ANSWER, BOX, END_BOX)

# Split at a group, and the tags stay in the list: text, tag, text, tag, ..., text.
_SPLIT = re.compile("(" + "|".join(re.escape(tag) for tag in TAGS) + ")")

_WELL_FORMED = {
    True: re.compile(r"^<think>(.*?)</think>\s*<answer>(.*?)</answer>$", re.DOTALL | re.IGNORECASE),
    False: re.compile(r"^<think>(.*?)</think>\s*(\S.*)$", re.DOTALL | re.IGNORECASE),
}

_ASSISTANT = "<|assistant|>"


class Kind(enum.StrEnum):
    """What a piece of text is."""

    TEXT = "text"
    """Outside all tags. All there is from a model that does not think: then it is the answer."""
    THOUGHT = "thought"
    ANSWER = "answer"
    BOX = "box"
    """Inside box tags, in an answer or in text outside all tags, to which it belongs as well."""


class Part(NamedTuple):
    """A piece of text of one kind, without tags."""

    kind: Kind
    text: str


@dataclasses.dataclass(frozen=True)
class Parsed:
    """A generated text taken apart; every string is without tags and without whitespace around it."""

    thought: str | None
    """None where nothing is marked as thought."""
    answer: str
    """The inside of `<answer>`; where there is no such tag, the text outside the thought."""
    boxed: tuple[str, ...]
    """The boxes of `answer`, the last one possibly unclosed; of nested ones the outermost."""
    is_thought_closed: bool
    """Whether `</think>` was there."""
    is_answer_closed: bool
    """Whether `</answer>` was there."""


class _Piece(NamedTuple):
    """What `ThinkingParser` remembers: text, or a box tag."""

    region: Kind
    text: str
    is_tag: bool
    depth: int
    """How many boxes the text is in; of a tag, how many are open after it."""


class ThinkingParser:
    """Splits a text that is being written into parts by its tags.

    The parts do not depend on where the text was cut into pushes, tags included: what may be the beginning of a tag
    waits for the next push. How tags are read:

    - `<think>` opens a thought, except in an answer, where it means nothing.
    - `</think>` closes it. Where none is open, and none was closed before, *everything so far was thought* (some
      prompts and servers swallow the opening tag, and a thought may speak about `<answer>`). The stream cannot take
      back what it handed out as text or answer; `parsed` says what it really was.
    - `<answer>` opens an answer, in a thought that nobody closed too. `</answer>` closes it.
    - Box tags mark a part of an answer, or of text outside all tags. In a thought they mean nothing.
    - A tag that means nothing is left out like any other.
    - In a format without tags of answers these are text. So are the tags of thoughts after the first thought, of which
      an answer may speak.

    A section outside all tags is omitted if it is only whitespace, as between `</think>` and `<answer>`. Other
    whitespace stays; `Parsed` has it stripped.
    """

    def __init__(self, thinking: ThinkingFormat = THINKING["tagged"], *, with_box_tags: bool = False) -> None:
        """Start an empty text of a format; `with_box_tags` leaves the tags of boxes in the parts."""
        self._has_answer_tags = thinking.has_answer_tags
        self._with_box_tags = with_box_tags
        self._pieces: list[_Piece] = []
        self._new: list[Part] = []
        self._held = ""
        self._region = Kind.TEXT
        self._depth = 0
        # Whitespace at the start of a section outside all tags; None once the section has shown something else.
        self._blank: list[str] | None = []
        self._has_thought = self._has_answer = False
        self._is_thought_closed = self._is_answer_closed = False
        self._was_thought_closed = thinking.begins_open is False
        if thinking.begins_open:
            self._read_tag(THINK)

    def push(self, text: str) -> list[Part]:
        """Take the next piece of text and return the parts that have become certain, neighbours of a kind as one."""
        text = self._held + text
        cut = start_of_unfinished_tag(text, TAGS)
        self._held = text[cut:]
        for index, piece in enumerate(_SPLIT.split(text[:cut])):
            if index % 2:
                self._read_tag(piece)
            elif piece:
                self._add_text(piece)
        return self._take_new()

    def push_answer(self, text: str) -> list[Part]:
        """Take text that belongs to the answer, whatever tags it seems to hold, as `push` takes any."""
        if self._held:
            self._add_text(self._held)
            self._held = ""
        self._blank = None
        self._show(text)
        return self._take_new()

    def finish(self) -> list[Part]:
        """Return what was held back; the text ends here."""
        if self._held:
            self._add_text(self._held)
            self._held = ""
        return self._take_new()

    @property
    def is_thought_open(self) -> bool:
        """Whether `</think>` has to be written before an answer can follow.

        True from the start on, as for a model that has not begun to think, until a thought is closed or an answer
        opened; true again where another thought begins. The rule of the reference's `trans_infer_bench.py`: what lacks
        `</think>` gets it.
        """
        is_over = self._was_thought_closed or self._is_thought_closed or self._has_answer
        return self._region is Kind.THOUGHT or not is_over

    def parsed(self) -> Parsed:
        """Return everything so far, without what is held back."""
        region = Kind.ANSWER if self._has_answer else Kind.TEXT
        return Parsed(
            thought=self._text_of(Kind.THOUGHT).strip() if self._has_thought else None,
            answer=self._text_of(region).strip(),
            boxed=_boxes([piece for piece in self._pieces if piece.region is region]),
            is_thought_closed=self._is_thought_closed,
            is_answer_closed=self._is_answer_closed,
        )

    def answer_with_boxes(self) -> str:
        """Return `parsed().answer` with its box tags."""
        region = Kind.ANSWER if self._has_answer else Kind.TEXT
        return "".join(piece.text for piece in self._pieces if piece.region is region).strip()

    @property
    def has_tags(self) -> bool:
        """Whether a tag of a thought or an answer has been read."""
        return self._has_thought or self._has_answer or self._is_answer_closed

    def _text_of(self, region: Kind) -> str:
        return "".join(piece.text for piece in self._pieces if piece.region is region and not piece.is_tag)

    def _is_text(self, tag: str) -> bool:
        """Whether a tag is ordinary text here."""
        if self._has_answer_tags or tag in (BOX, END_BOX):
            return False
        return tag in (ANSWER, END_ANSWER) or self._was_thought_closed

    def _read_tag(self, tag: str) -> None:
        if self._is_text(tag):
            self._add_text(tag)
        elif tag == THINK and self._region is not Kind.ANSWER:
            self._enter(Kind.THOUGHT)
            self._has_thought, self._is_thought_closed = True, False
        elif tag == END_THINK:
            self._close_thought()
        elif tag == ANSWER and self._region is not Kind.ANSWER:
            self._enter(Kind.ANSWER)
            self._has_answer, self._is_answer_closed = True, False
        elif tag == END_ANSWER and self._region is not Kind.THOUGHT:
            self._enter(Kind.TEXT)
            self._is_answer_closed = True
        elif tag in (BOX, END_BOX) and self._region is not Kind.THOUGHT:
            self._release_blank()
            self._depth = self._depth + 1 if tag == BOX else max(self._depth - 1, 0)
            self._pieces.append(_Piece(self._region, tag, True, self._depth))
            if self._with_box_tags:
                self._add_part(tag)

    def _close_thought(self) -> None:
        if self._region is not Kind.THOUGHT:
            if self._was_thought_closed:
                return
            self._pieces = [_Piece(Kind.THOUGHT, piece.text, False, 0) for piece in self._pieces if not piece.is_tag]
            self._has_answer = self._is_answer_closed = False
        self._enter(Kind.TEXT)
        self._has_thought = self._is_thought_closed = self._was_thought_closed = True

    def _enter(self, region: Kind) -> None:
        self._region = region
        self._depth = 0
        self._blank = [] if region is Kind.TEXT else None

    def _add_text(self, text: str) -> None:
        if self._blank is not None and text.isspace():
            self._blank.append(text)
            return
        self._release_blank()
        self._show(text)

    def _release_blank(self) -> None:
        blank, self._blank = self._blank, None
        if blank:
            self._show("".join(blank))

    def _show(self, text: str) -> None:
        self._pieces.append(_Piece(self._region, text, False, self._depth))
        self._add_part(text)

    def _add_part(self, text: str) -> None:
        kind = Kind.BOX if self._depth else self._region
        if self._new and self._new[-1].kind is kind:
            text = self._new.pop().text + text
        self._new.append(Part(kind, text))

    def _take_new(self) -> list[Part]:
        new, self._new = self._new, []
        return new


def parse(text: str, thinking: ThinkingFormat = THINKING["tagged"]) -> Parsed:
    r"""Take a finished text apart; `ThinkingParser` says by which rules. Never raises.

    The default reads texts of either format, as long as an answer without tags does not speak of `<answer>`.

    >>> parse("<think>4</think>\nIt is four.").answer
    'It is four.'
    """
    return _read(text, thinking).parsed()


def without_thoughts(text: str, thinking: ThinkingFormat = THINKING["tagged"]) -> str:
    """Return what of an assistant's turn goes into the history: its answer.

    As in the reference's `trans_infer_cli.py` that is the inside of `<answer>`, stripped, *with* its box tags, which
    are tokens of the answer that the model gave; but an unclosed answer counts too, and without `<answer>` the text
    outside the thought does. A text without tags of a thought or an answer stays as it is. A turn that was cut off in
    its thought leaves an empty string.
    """
    parser = _read(text, thinking)
    return parser.answer_with_boxes() if parser.has_tags else text


def is_well_formed(text: str, thinking: ThinkingFormat = THINKING["tagged"]) -> bool:
    """Whether `text` keeps to the format for which training rewarded the model (`check_answer_format`).

    That is one thought and one closed answer with nothing but whitespace between them and nothing around them, none of
    their tags inside, at most one box and no LaTeX one; upper and lower case do not matter. `</answer>` must be in the
    text, which ends the generation and may therefore have to be put back. In a format without tags of answers, it is
    one thought with some text after it, by the same rules.
    """
    match = _WELL_FORMED[thinking.has_answer_tags].search(text)
    if match is None:
        return False
    thought, answer = (group.lower() for group in match.groups())
    if any(tag in part for tag in (THINK, END_THINK, ANSWER, END_ANSWER) for part in (thought, answer)):
        return False
    return answer.count(BOX) <= 1 and answer.count(END_BOX) <= 1 and "\\boxed{" not in answer


def format_after(thinking: ThinkingFormat, prompt_ids: "np.ndarray", tokenizer: "Glm4vTokenizer") -> ThinkingFormat:
    """Return the format of what a model writes after a prompt, which may end within a thought or after one."""
    return dataclasses.replace(thinking, begins_open=thought_before(prompt_ids, tokenizer))


def thought_before(prompt_ids: "np.ndarray", tokenizer: "Glm4vTokenizer") -> bool | None:
    """Whether a prompt ends within a thought, True, or after the one of this turn, False; None if it has none.

    Some chat templates open a thought; those that know `enable_thinking` open and close it to switch it off.
    """
    to_id = tokenizer.backend_tokenizer.token_to_id
    assistant, think, end = (_last(prompt_ids, to_id(token)) for token in (_ASSISTANT, THINK, END_THINK))
    return None if max(think, end) <= assistant else think > end


def _last(ids: "np.ndarray", token: int | None) -> int:
    """The place of the last of these tokens, -1 for none."""
    (found,) = (ids == (-1 if token is None else token)).nonzero()
    return int(found[-1]) if found.size else -1


def _read(text: str, thinking: ThinkingFormat) -> ThinkingParser:
    parser = ThinkingParser(thinking)
    parser.push(text)
    parser.finish()
    return parser


def start_of_unfinished_tag(text: str, tags: Sequence[str]) -> int:
    """Return the index of the end of `text` that may become one of `tags`; its length if there is no such end.

    >>> start_of_unfinished_tag("4</ans", TAGS), start_of_unfinished_tag("4 < 5", TAGS)
    (1, 5)
    """
    start = text.rfind("<")
    if start >= 0 and any(len(tag) > len(text) - start and tag.startswith(text[start:]) for tag in tags):
        return start
    return len(text)


def _boxes(pieces: list[_Piece]) -> tuple[str, ...]:
    boxes: list[list[str]] = []
    for piece in pieces:
        if piece.text == BOX and piece.depth == 1:
            boxes.append([])
        elif piece.depth and not piece.is_tag:
            boxes[-1].append(piece.text)
    return tuple("".join(box).strip() for box in boxes)
