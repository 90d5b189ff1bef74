"""Thought, answer and box of a text, whole and piece by piece."""

import dataclasses
import re
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from glm4v_jax.config.thinking import THINKING
from glm4v_jax.generate.text.thinking import (
    ANSWER,
    BOX,
    END_ANSWER,
    END_BOX,
    END_THINK,
    TAGS,
    THINK,
    Kind,
    Parsed,
    Part,
    ThinkingParser,
    is_well_formed,
    parse,
    without_thoughts,
)

PLAIN = THINKING["plain"]
RELEASED = (
    "\n<think>Got it, let's look at the image.</think>\n<answer>The dog is at "
    "<|begin_of_box|>[1, 2, 3, 4]<|end_of_box|>, left."
)

# Texts of tags, pieces of tags, whitespace and words in any order.
TEXTS = st.lists(
    st.sampled_from([*TAGS, "<", "<th", "</", "<|begin_of_", "think>", "|>", " ", "\n", "word", "二", "a < b"]),
    max_size=25,
).map("".join)

# A text put together from sections, each a kind and pieces that are boxed or not.
PIECES = st.tuples(st.booleans(), st.text("ab <|/\n", min_size=1, max_size=6).filter(str.strip))
SECTIONS = st.lists(
    st.tuples(st.sampled_from([Kind.TEXT, Kind.THOUGHT, Kind.ANSWER]), st.lists(PIECES, min_size=1, max_size=4)),
    min_size=1,
    max_size=6,
)
SECTION_TAGS = {Kind.TEXT: ("", ""), Kind.THOUGHT: (THINK, END_THINK), Kind.ANSWER: (ANSWER, END_ANSWER)}


def _stream(text, cuts=()):
    parser = ThinkingParser()
    parts = []
    for start, end in pairwise([0, *sorted(min(cut, len(text)) for cut in cuts), len(text)]):
        new = parser.push(text[start:end])
        assert all(one.kind is not other.kind for one, other in pairwise(new))
        assert all(part.text for part in new)
        parts += new
    return parts + parser.finish(), parser


def _merged(parts):
    merged = []
    for kind, text in parts:
        if merged and merged[-1][0] is kind:
            merged[-1] = (kind, merged[-1][1] + text)
        else:
            merged.append((kind, text))
    return merged


class TestParse:
    @pytest.mark.parametrize(
        ("text", "expected"),
        [
            ("", Parsed(None, "", (), False, False)),
            (" plain ", Parsed(None, "plain", (), False, False)),
            (
                RELEASED,
                Parsed(
                    "Got it, let's look at the image.",
                    "The dog is at [1, 2, 3, 4], left.",
                    ("[1, 2, 3, 4]",),
                    True,
                    False,
                ),
            ),
            ("<think> t </think> <answer> a </answer>", Parsed("t", "a", (), True, True)),
            ("<think>t", Parsed("t", "", (), False, False)),
            ("<think></think>a", Parsed("", "a", (), True, False)),
            ("<think>t<answer>a", Parsed("t", "a", (), False, False)),
            ("<think>t</think> a", Parsed("t", "a", (), True, False)),
            ("<answer>a</answer> more", Parsed(None, "a", (), False, True)),
            ("a</answer>", Parsed(None, "a", (), False, True)),
            ("t</think><answer>a", Parsed("t", "a", (), True, False)),
            ("<think>I use <answer> tags.</think><answer>a", Parsed("I use  tags.", "a", (), True, False)),
            ("<think>t</think><answer>of <think> and </think> tags", Parsed("t", "of  and  tags", (), True, False)),
            ("<think>one</think><think>two", Parsed("onetwo", "", (), False, False)),
            ("<answer>x</answer><answer>y", Parsed(None, "xy", (), False, False)),
            ("<answer>1<|begin_of_box|> 4", Parsed(None, "1 4", ("4",), False, False)),
            (
                "<answer><|begin_of_box|>4</answer><answer><|begin_of_box|>5",
                Parsed(None, "45", ("4", "5"), False, False),
            ),
            (
                "<answer><|begin_of_box|>a<|begin_of_box|>b<|end_of_box|>c<|end_of_box|><|end_of_box|>d",
                Parsed(None, "abcd", ("abc",), False, False),
            ),
            ("<|begin_of_box|><|end_of_box|>", Parsed(None, "", ("",), False, False)),
            ("<think><|begin_of_box|>x<|end_of_box|></think>y", Parsed("x", "y", (), True, False)),
            ("<|begin_of_box|>x<|end_of_box|></think>y", Parsed("x", "y", (), True, False)),
            ("if a <b and c</ d <|", Parsed(None, "if a <b and c</ d <|", (), False, False)),
        ],
    )
    def test_cases(self, text, expected):
        assert parse(text) == expected

    def test_unclosed_and_closed_answers_are_equal_but_for_the_flag(self):
        closed = parse(RELEASED + "</answer>")
        assert closed.is_answer_closed
        assert parse(RELEASED) == Parsed(closed.thought, closed.answer, closed.boxed, True, False)


class TestPlain:
    """The format without tags of answers."""

    @pytest.mark.parametrize(
        ("text", "expected"),
        [
            ("<think>t</think>\n a ", Parsed("t", "a", (), True, False)),
            ("<think>t", Parsed("t", "", (), False, False)),
            ("no thought", Parsed(None, "no thought", (), False, False)),
            ("t</think>a", Parsed("t", "a", (), True, False)),
            ("<think>t <answer></think>\na", Parsed("t <answer>", "a", (), True, False)),
            # An answer may speak of tags.
            ("<think>t</think><answer>a</answer>", Parsed("t", "<answer>a</answer>", (), True, False)),
            ("<think>t</think>of <think> and </think>", Parsed("t", "of <think> and </think>", (), True, False)),
            ("<think>t</think>\n<|begin_of_box|>4<|end_of_box|>.", Parsed("t", "4.", ("4",), True, False)),
        ],
    )
    def test_cases(self, text, expected):
        assert parse(text, PLAIN) == expected
        parser = ThinkingParser(PLAIN)
        for character in text:
            parser.push(character)
        parser.finish()
        assert parser.parsed() == expected

    def test_a_text_may_begin_within_a_thought_or_after_one(self):
        within, after = (dataclasses.replace(PLAIN, begins_open=is_open) for is_open in (True, False))
        assert parse("t", within) == Parsed("t", "", (), False, False)
        assert parse("t</think>\na", within) == Parsed("t", "a", (), True, False)
        assert parse("a</think>b<think>", after) == Parsed(None, "a</think>b<think>", (), False, False)
        assert ThinkingParser(within).is_thought_open and not ThinkingParser(after).is_thought_open
        tagged = dataclasses.replace(THINKING["tagged"], begins_open=False)
        assert parse("a</think>b", tagged) == Parsed(None, "ab", (), False, False)

    def test_history_and_form(self):
        assert without_thoughts("<think>t</think>\n<answer>a", PLAIN) == "<answer>a"
        assert is_well_formed("<think>t</think>\na", PLAIN) and not is_well_formed("<think>t</think>\na")
        for text in ("<think>t</think>\n", "a", "<think>t</think>\n<think>a", "a<think>t</think>b"):
            assert not is_well_formed(text, PLAIN)


class TestStream:
    def test_parts(self):
        parts, _ = _stream(RELEASED)
        assert parts == [
            Part(Kind.THOUGHT, "Got it, let's look at the image."),
            Part(Kind.ANSWER, "The dog is at "),
            Part(Kind.BOX, "[1, 2, 3, 4]"),
            Part(Kind.ANSWER, ", left."),
        ]

    def test_a_piece_is_shown_as_soon_as_it_can_be_no_tag(self):
        parser = ThinkingParser()
        assert parser.push("a <") == [Part(Kind.TEXT, "a ")]
        assert parser.push("thin") == []
        assert parser.push("g>") == [Part(Kind.TEXT, "<thing>")]
        assert parser.push("</think") == []
        assert parser.finish() == [Part(Kind.TEXT, "</think")]

    @pytest.mark.parametrize("cuts", [(), range(200)])
    @pytest.mark.parametrize(
        "text", [RELEASED, "a<|begin_of_box|>b<|end_of_box|><|end_of_box|> c", "<|begin_of_box|>d"]
    )
    def test_box_tags_stay_where_they_are_asked_for(self, text, cuts):
        parser = ThinkingParser(with_box_tags=True)
        pieces = [text[start:end] for start, end in pairwise([0, *(cut for cut in cuts if cut < len(text)), len(text)])]
        parts = [part for piece in pieces for part in parser.push(piece)] + parser.finish()
        assert "".join(part.text for part in parts if part.kind is not Kind.THOUGHT) == without_thoughts(text)
        assert parser.parsed() == parse(text)

    def test_a_stray_end_cannot_be_taken_back_from_the_stream(self):
        parts, parser = _stream("t</think>a")
        assert parts == [Part(Kind.TEXT, "ta")]
        assert parser.parsed() == Parsed("t", "a", (), True, False)

    def test_whitespace_stays_inside_tags_and_within_text(self):
        parts, _ = _stream(" \n<think>\n t\n</think>\n\n<answer> a </answer>\n")
        assert parts == [Part(Kind.THOUGHT, "\n t\n"), Part(Kind.ANSWER, " a ")]
        parts, _ = _stream("<think>t</think>\n a \n<|begin_of_box|>b<|end_of_box|> ", cuts=range(99))
        assert _merged(parts) == [(Kind.THOUGHT, "t"), (Kind.TEXT, "\n a \n"), (Kind.BOX, "b"), (Kind.TEXT, " ")]

    @given(TEXTS, st.lists(st.integers(0, 150), max_size=12))
    def test_cuts_change_nothing(self, text, cuts):
        whole, parser = _stream(text)
        for pieces, other in (_stream(text, cuts), _stream(text, range(len(text)))):
            assert _merged(pieces) == _merged(whole)
            assert other.parsed() == parser.parsed() == parse(text)
            assert other.is_thought_open == parser.is_thought_open

    @given(TEXTS)
    def test_parts_are_the_text_without_tags(self, text):
        parts, _ = _stream(text)
        shown = "".join(part.text for part in parts)
        expected = "".join(re.split("|".join(map(re.escape, TAGS)), text))
        assert re.sub(r"\s", "", shown) == re.sub(r"\s", "", expected)

    @given(SECTIONS, st.booleans(), st.lists(st.integers(0, 150), max_size=12))
    def test_parts_are_what_was_put_together(self, sections, is_last_closed, cuts):
        text, expected = "", []
        for index, (kind, pieces) in enumerate(sections):
            begin, end = SECTION_TAGS[kind]
            is_closed = is_last_closed or index < len(sections) - 1
            boxed = [is_boxed and kind is not Kind.THOUGHT for is_boxed, _ in pieces]
            inner = [BOX + piece + END_BOX if box else piece for box, (_, piece) in zip(boxed, pieces, strict=True)]
            text += begin + "".join(inner) + (end if is_closed else "")
            expected += [(Kind.BOX if box else kind, piece) for box, (_, piece) in zip(boxed, pieces, strict=True)]
        parts, parser = _stream(text, cuts)
        assert _merged(parts) == _merged(expected)

        thoughts, answers, texts = (
            "".join(piece for kind, pieces in sections if kind is wanted for _, piece in pieces).strip()
            for wanted in (Kind.THOUGHT, Kind.ANSWER, Kind.TEXT)
        )
        kinds = [kind for kind, _ in sections]
        answering = Kind.ANSWER if Kind.ANSWER in kinds else Kind.TEXT
        assert parser.parsed() == Parsed(
            thought=thoughts if Kind.THOUGHT in kinds else None,
            answer=answers if Kind.ANSWER in kinds else texts,
            boxed=tuple(
                piece.strip() for kind, pieces in sections for box, piece in pieces if box and kind is answering
            ),
            is_thought_closed=Kind.THOUGHT in kinds and (is_last_closed or kinds[-1] is not Kind.THOUGHT),
            is_answer_closed=Kind.ANSWER in kinds and (is_last_closed or kinds[-1] is not Kind.ANSWER),
        )


class TestHistory:
    @pytest.mark.parametrize(
        ("text", "expected"),
        [
            (" as it is\n", " as it is\n"),
            ("a <|begin_of_box|>b<|end_of_box|> ", "a <|begin_of_box|>b<|end_of_box|> "),
            (RELEASED, "The dog is at <|begin_of_box|>[1, 2, 3, 4]<|end_of_box|>, left."),
            ("<think>t</think>\na", "a"),
            ("t</think>\na", "a"),
            ("a </answer>", "a"),
            ("<think>cut off", ""),
        ],
    )
    def test_cases(self, text, expected):
        assert without_thoughts(text) == expected

    def test_is_what_the_released_command_line_keeps(self):
        for answer in ("42", " 42\n", "x <|begin_of_box|>1<|end_of_box|>", ""):
            text = f"<think>a\nb</think>\n<answer>{answer}</answer>"
            kept = re.search(r"<answer>(.*?)</answer>", text, re.DOTALL)[1].strip()
            assert without_thoughts(text) == without_thoughts(text.removesuffix("</answer>")) == kept

    @given(TEXTS)
    def test_twice_is_once(self, text):
        once = without_thoughts(text)
        assert without_thoughts(once) == once


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", True),
        ("words", True),
        ("<think>t", True),
        ("<think>t</think", True),
        ("<think>t</think>", False),
        ("t</think>", False),
        ("<think>t<answer>a", False),
        ("<answer>a</answer>", False),
        ("<think>t</think><think>again", True),
        ("<think>t</think><answer>a</answer><think>again", True),
    ],
)
def test_a_thought_is_open(text, expected):
    parser = ThinkingParser()
    parser.push(text)
    assert parser.is_thought_open is expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("<think>t</think><answer>a</answer>", True),
        ("<think>\nt\n</think>\n <answer>a\nb</answer>", True),
        ("<think></think><answer></answer>", True),
        ("<THINK>t</Think><Answer>a</ANSWER>", True),
        ("<think>t</think><answer><|begin_of_box|>4<|end_of_box|></answer>", True),
        ("<think><|begin_of_box|>1<|end_of_box|><|begin_of_box|>2</think><answer>a</answer>", True),
        ("<think>\\boxed{1}</think><answer>a</answer>", True),
        ("\n<think>t</think><answer>a</answer>", False),
        ("<think>t</think><answer>a</answer> more", False),
        ("<think>t</think>between<answer>a</answer>", False),
        ("<think>t</think><answer>a", False),
        ("<answer>a</answer>", False),
        ("<think>t<think>u</think><answer>a</answer>", False),
        ("<think>t<answer>u</think><answer>a</answer>", False),
        ("<think>t</think><answer>a</Think></answer>", False),
        ("<think>t</think><answer>a</answer><answer>b</answer>", False),
        ("<think>t</think><answer><|begin_of_box|>4<|end_of_box|><|begin_of_box|>5</answer>", False),
        ("<think>t</think><answer>4<|end_of_box|><|END_of_box|></answer>", False),
        ("<think>t</think><answer>\\boxed{4}</answer>", False),
    ],
)
def test_is_well_formed(text, expected):
    assert is_well_formed(text) is expected
