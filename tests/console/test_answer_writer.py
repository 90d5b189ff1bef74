"""What a terminal shows of an answer, and what a pipe gets."""

import pytest

from glm4v_jax.console.answer_writer import AnswerTimes, AnswerWriter, Stopwatch, figures
from glm4v_jax.generate.completion import Completion, Counts, Delta
from glm4v_jax.generate.text.thinking import ThinkingParser

DIM, BOLD, PLAIN = "\x1b[2;3m", "\x1b[1m", "\x1b[0m"
THOUGHT = "<think>a cat?</think>\n<answer>A <|begin_of_box|>cat<|end_of_box|>.</answer>"


@pytest.fixture
def shown(monkeypatch, capfd):
    """What a terminal shows of a text that comes in parts."""

    def show(text, parts=1, **variables):
        for name, value in {"FORCE_COLOR": "1", "TERM": "xterm-256color", **variables}.items():
            monkeypatch.setenv(name, value)
        for name in {"NO_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE"} - variables.keys():
            monkeypatch.delenv(name, raising=False)
        writer, parser = AnswerWriter(), ThinkingParser()
        step = -(-len(text) // parts)
        for start in range(0, len(text), step):
            part = text[start : start + step]
            writer.show(Delta(part, tuple(parser.push(part)), ()))
        writer.show(Delta("", tuple(parser.finish()), ()))
        writer.end(Completion(0, text, (), 0, "stop"))
        return capfd.readouterr().out

    return show


def test_thoughts_are_dim_boxes_bold_and_tags_hidden(shown):
    expected = f"{DIM}a cat?{PLAIN}\n\nA {BOLD}cat{PLAIN}.\n"
    assert shown(THOUGHT) == expected
    in_parts = shown(THOUGHT, len(THOUGHT))
    for code in (DIM, BOLD, PLAIN):
        expected, in_parts = expected.replace(code, ""), in_parts.replace(code, "")
    assert in_parts == expected


def test_a_terminal_without_styles_shows_the_tags(shown):
    assert shown(THOUGHT, TERM="dumb") == THOUGHT + "\n"


def test_a_thought_without_its_opening_tag_is_noted_at_the_end(shown):
    text = shown("a cat?</think><answer>A cat.")
    assert text.startswith("a cat?\n\nA cat.\n")
    assert "the text before </think> is a thought" in text


def test_long_lines_are_left_to_the_terminal(shown, monkeypatch):
    monkeypatch.setenv("COLUMNS", "20")
    assert shown("word " * 30, 7) == "word " * 30 + "\n"


@pytest.mark.parametrize(
    ("tokens", "burst", "end", "rate"), [(21, 1, 12.0, 10), (8, 8, 12.0, None), (9, 8, 10.01, None)]
)
def test_the_rate_is_measured_after_the_first_part(tokens, burst, end, rate):
    watch = Stopwatch(clock=iter([0.0, 10.0, end]).__next__)
    watch.note(Delta("", (), (1,) * burst))
    watch.note(Delta("", (), (1,)))
    assert watch.stop(tokens) == AnswerTimes(end, 0.0, 10.0, rate)


def test_times_of_an_answer_are_without_compilation():
    compiled = [6.0]
    watch = Stopwatch(compiled, clock=iter([0.0, 10.0, 20.0]).__next__)
    watch.note(Delta("", (), (1,)))
    compiled.append(8.0)  # of decoding, which begins after the first part
    assert watch.stop(9) == AnswerTimes(20.0, 14.0, 4.0, 4.0)


def test_figures_have_compilation_only_where_it_took_long():
    completion, counts = Completion(0, "", (1, 2), 9, "stop", stop_string="x"), Counts(0, 2)
    line = figures(completion, counts, AnswerTimes(9.6, 9.1, 9.2, 5.0), reused=7)
    assert line == (
        "9 prompt tokens (7 from the cache), 2 new in 9.60 s (9.1 s compiling), first after 9.20 s, then 5.0 tokens/s, "
        "finish reason: stop ('x')"
    )
    assert "compiling" not in figures(completion, counts, AnswerTimes(9.6, 0.4, 9.2, 5.0))
