"""Loops are noticed, and nothing that people and models write on purpose is."""

import random
import sys

import pytest
from helpers_paths import ROOT
from hypothesis import given
from hypothesis import strategies as st

from glm4v_jax.errors import GenerationError
from glm4v_jax.generate.text.repetition import RepetitionGuard

PARAGRAPH = (
    "Wait, let me look at the picture again. The clock on the wall shows ten past ten, so the answer is the first. "
)


def _first(text, **options):
    """How many characters it takes until the text loops, or None."""
    guard = RepetitionGuard(**options)
    for index, character in enumerate(text):
        if guard.push(character):
            return index + 1
    return None


def _is_loop(text, window, times):
    """The definition, tried for every piece."""
    return any(text.endswith(text[-size:] * times) for size in range(window, len(text) // times + 1))


class TestLoops:
    @pytest.mark.parametrize("prelude", ["", "Let me see:\n", PARAGRAPH[:70], "x" * 49])
    def test_paragraph_at_its_tenth_copy(self, prelude):
        assert 100 < len(PARAGRAPH) < 130
        assert _first(prelude + PARAGRAPH * 10) == len(prelude) + len(PARAGRAPH) * 10
        assert _first(prelude + PARAGRAPH * 9 + PARAGRAPH[:-1]) is None

    @pytest.mark.parametrize("piece", ["a", "ha", "=", "\n", " ", "- ", "猫", "!" * 50, "0123456789", "\ufffd"])
    def test_short_pieces_after_five_hundred_characters(self, piece):
        assert _first(piece * 600) == 500

    def test_a_piece_that_no_window_is_a_multiple_of(self):
        assert _first("1234567" * 600) == 56 * 10

    def test_a_piece_with_repetitions_of_its_own_is_noticed_some_copies_late(self):
        first, second, third = (f"This is the {name} sentence, which is longer than a window is. " for name in "abc")
        piece = first + second + first + second + first + third
        found = _first("So. " + piece * 20)
        assert found is not None
        assert len(piece) * 10 <= found <= len(piece) * 12

    def test_a_loop_after_much_else(self):
        text = (ROOT / "LICENSE").read_text(encoding="utf-8")
        assert _first(text + PARAGRAPH * 12) <= len(text) + 11 * len(PARAGRAPH)

    def test_true_for_ever_after(self):
        guard = RepetitionGuard()
        assert guard.push(PARAGRAPH * 11)
        assert guard.push("Something else.")


class TestNoLoops:
    @pytest.mark.parametrize(
        "text",
        [
            "=" * 60,
            "=" * 200 + "\n",
            "The result is 1/3 = 0." + "3" * 300,
            PARAGRAPH * 9,
            "\n".join(
                f"| {n} | {n * 37 % 100} | {'waiting for an answer from the other department':<60} |"
                for n in range(300)
            ),
            "\n".join(
                f'    {{"label": "person", "type": "object", "attributes": null, "id": {n}}},' for n in range(300)
            ),
            "\n".join(f"    self.assertEqual(function_under_test_with_a_long_name({n}), {n * n})" for n in range(200)),
            "".join(
                f'<td style="border: 1px solid black; padding: 4px; text-align: left">{n}</td>\n' for n in range(200)
            ),
            "\n".join("|" + " --- |" * 12 + f"\n| {n} |" for n in range(100)),
        ],
    )
    def test_rulers_tables_and_code(self, text):
        assert _first(text) is None

    @pytest.mark.parametrize("pattern", ["LICENSE", "README.md", "pyproject.toml", "glm4v_jax/**/*.py", "tests/*.py"])
    def test_what_people_wrote(self, pattern):
        paths = sorted(ROOT.glob(pattern))
        assert paths
        for path in paths:
            text = path.read_text(encoding="utf-8")
            assert not RepetitionGuard().push(text), path


class TestIncrements:
    @given(st.text("ab", max_size=80), st.lists(st.integers(1, 9), max_size=10))
    def test_cuts_change_nothing(self, text, sizes):
        whole, pieces = RepetitionGuard(4, 3), RepetitionGuard(4, 3)
        start, answer = 0, False
        for size in [*sizes, len(text)]:
            answer = pieces.push(text[start : start + size])
            start += size
        assert answer == whole.push(text)

    @given(st.text("abc", max_size=20), st.text("abc", min_size=1, max_size=12))
    def test_whatever_is_noticed_is_a_loop(self, prelude, piece):
        text = prelude + piece * 12
        found = _first(text, window=4, times=3)
        assert found is not None
        assert any(_is_loop(text[:end], 4, 3) for end in range(found + 1))
        assert _is_loop(text[:found], 4, 3)

    @given(st.text("ab", max_size=60))
    def test_nothing_is_noticed_where_there_is_no_loop(self, text):
        if not any(_is_loop(text[:end], 4, 3) for end in range(len(text) + 1)):
            assert _first(text, window=4, times=3) is None

    @pytest.mark.parametrize("alphabet", ["abcdefgh ", "ab"])
    def test_every_character_takes_as_many_steps(self, alphabet):
        text = "".join(random.Random(0).choices(alphabet, k=16_000))

        def lines(count):
            guard, executed = RepetitionGuard(), 0

            def trace(*_):
                nonlocal executed
                executed += 1
                return trace

            before = sys.gettrace()
            sys.settrace(trace)
            try:
                for index in range(0, count, 5):
                    guard.push(text[index : index + 5])
            finally:
                sys.settrace(before)
            assert not guard.push("")
            return executed

        assert lines(16_000) < 1.1 * 8 * lines(2_000)

    def test_errors(self):
        with pytest.raises(GenerationError, match="window: found 0"):
            RepetitionGuard(window=0)
        with pytest.raises(GenerationError, match="times: found 1"):
            RepetitionGuard(times=1)
