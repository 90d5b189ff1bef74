"""What a row's tokens mean, with tokens written by hand in the place of a model."""

import numpy as np
import pytest
from helpers_checkpoints import RANDOM_CHECKPOINT

from glm4v_jax.config.generation import GenerationConfig
from glm4v_jax.config.thinking import THINKING
from glm4v_jax.generate.sequence import SequenceState
from glm4v_jax.generate.token_logprobs import TokenLogprob, TokenLogprobs
from glm4v_jax.inputs.prompt import Prompt
from glm4v_jax.inputs.text.tokenizer import Glm4vTokenizer

EOS = 775  # <|user|>
TAGGED, PLAIN = THINKING["tagged"], THINKING["plain"]


@pytest.fixture(scope="module")
def tokenizer():
    return Glm4vTokenizer.from_pretrained(RANDOM_CHECKPOINT)


def begin(tokenizer, prompt=range(5), thinking=TAGGED, **options):
    config = GenerationConfig(**{"eos_token_id": (EOS, 787), **options})
    return SequenceState(Prompt.of_text(prompt), config, tokenizer, 1000, thinking=thinking)


def feed(answer, tokens, size, done=True):
    """All deltas of tokens that come `size` at a time, and what the last of them asks for."""
    deltas, start = [], None
    for i in range(0, len(tokens), size):
        delta, start = answer.take(tokens[i : i + size], done and i + size >= len(tokens))
        deltas.append(delta)
        if start is not None or answer.finish_reason is not None:
            break
    return deltas, start


@pytest.mark.parametrize("size", [1, 2, 3, 100])
def test_parts(tokenizer, size):
    answer = begin(tokenizer, max_new_tokens=50)
    tokens = [*tokenizer.encode("<think>two and two</think>\n<answer>It is 4."), 787]
    deltas, start = feed(answer, tokens, size)
    found = deltas[-1].completion
    assert start is None and found.finish_reason == "stop" and found.tokens == tuple(tokens)
    assert found.text == "<think>two and two</think>\n<answer>It is 4.</answer>"
    assert (found.thought, found.answer, found.parsed.is_answer_closed) == ("two and two", "It is 4.", True)
    said = {kind: "".join(p.text for d in deltas for p in d.parts if p.kind == kind) for kind in ("thought", "answer")}
    assert said == {"thought": "two and two", "answer": "It is 4."}


@pytest.mark.parametrize("size", [1, 4, 100])
def test_a_thought_within_its_budget_needs_no_help(tokenizer, size):
    tokens = [*tokenizer.encode("<think>a</think><answer>b"), 787]
    answer = begin(tokenizer, think_budget=len(tokens) + 3, answer_budget=5)
    assert answer.start().limit == len(tokens) + 3
    deltas, start = feed(answer, tokens, size)
    assert start is None and deltas[-1].completion.answer == "b"


def test_an_answer_that_the_budget_cut_goes_on_as_it_is(tokenizer):
    tokens = tokenizer.encode("<think>a</think><answer>one two three")
    answer = begin(tokenizer, think_budget=len(tokens), answer_budget=7)
    deltas, start = feed(answer, tokens, 100)
    assert deltas[-1].completion is None
    # Nothing is put in: the newest token is run, and the next ones are the answer's.
    assert (start.keep, len(start.prompt), start.step) == (5 + len(tokens) - 1, 5 + len(tokens), len(tokens))
    assert start.limit == len(tokens) + 7
    deltas, start = feed(answer, [*tokenizer.encode(" four"), EOS], 1)
    assert start is None and deltas[-1].completion.answer == "one two three four"


@pytest.mark.parametrize("ended", [False, True])
def test_an_open_thought_is_closed(tokenizer, ended):
    body = tokenizer.encode("<think>a b c")
    tokens = [*body, EOS] if ended else body
    answer = begin(tokenizer, think_budget=len(body) + ended, answer_budget=7, logprobs=0)
    deltas, start = feed(answer, tokens, 100)
    close = tokenizer.encode("</think><answer>")
    assert deltas[-1].text == "<think>a b c</think><answer>"
    assert start.prompt.input_ids[5:].tolist() == [*body, *close]
    # The newest token is in no cache yet; the end token never gets there.
    assert start.keep == 5 + len(body) - (not ended)
    assert (start.step, start.limit) == (len(tokens), len(tokens) + 7)
    assert start.prompt.position_ids[:, -1].tolist() == [5 + len(body) + 1] * 3
    deltas, start = feed(answer, [*tokenizer.encode("d"), EOS], 1)
    found = deltas[-1].completion
    assert start is None and (found.thought, found.answer) == ("a b c", "d")
    assert found.tokens == (*body, *close, *tokenizer.encode("d"), EOS)


def test_a_format_without_tags_of_answers_gets_none(tokenizer):
    body, close = tokenizer.encode("<think>a b c"), tokenizer.encode("</think>\n")
    answer = begin(tokenizer, thinking=PLAIN, think_budget=len(body), answer_budget=7)
    deltas, start = feed(answer, body, 100)
    assert deltas[-1].text == "<think>a b c</think>\n" and start.prompt.input_ids[5:].tolist() == [*body, *close]
    deltas, _ = feed(answer, [*tokenizer.encode("<answer> d"), EOS], 1)
    found = deltas[-1].completion
    assert (found.thought, found.answer, found.is_forced) == ("a b c", "<answer> d", True)


@pytest.mark.parametrize("size", [1, 100])
@pytest.mark.parametrize(
    ("thinking", "prompt", "put"),
    [
        (TAGGED, "", "<think></think><answer>"),
        (PLAIN, "", "<think></think>\n"),
        (TAGGED, "<think>\n", "</think><answer>"),
        (PLAIN, "<think></think>\n", ""),
        (PLAIN, "<think>a</think>b<|assistant|>", "<think></think>\n"),
    ],
)
def test_no_thought_at_all(tokenizer, thinking, prompt, put, size):
    """The end of an empty thought comes before the first token, unless the prompt has it."""
    prompt = [0, *tokenizer.encode(prompt)]
    answer = begin(tokenizer, prompt, thinking=thinking, think_budget=0, max_new_tokens=9, logprobs=0)
    forced = tokenizer.encode(put)
    start = answer.start()
    assert start.prompt.input_ids.tolist() == [*prompt, *forced] and (start.step, start.limit) == (0, 9)
    assert answer.max_total_tokens == len(forced) + 9 and not answer.may_continue
    tokens = [*tokenizer.encode("four"), EOS]
    deltas = []
    for i in range(0, len(tokens), size):
        entries = [TokenLogprob(token, -1.0, ()) for token in tokens[i : i + size]]
        deltas.append(answer.take(tokens[i : i + size], i + size >= len(tokens), TokenLogprobs.of(entries))[0])
    found = deltas[-1].completion
    assert found.text == put + "four" == "".join(delta.text for delta in deltas)
    assert found.tokens == (*forced, *tokens) == tuple(t for delta in deltas for t in delta.tokens)
    assert found.is_sampled.tolist() == [False] * len(forced) + [True] * len(tokens)
    assert np.isnan(found.logprob_array[: len(forced)]).all()
    assert [entry.logprob for entry in found.logprobs] == [None] * len(forced) + [-1.0] * len(tokens)
    assert (found.answer, found.thought or "") == ("four", "") and not found.is_forced
    assert "".join(part.text for delta in deltas for part in delta.parts).strip() == "four"


def test_a_thought_that_the_prompt_has_closed_needs_no_budget(tokenizer):
    prompt = [0, *tokenizer.encode("<think></think>\n")]
    answer = begin(tokenizer, prompt, thinking=PLAIN, think_budget=3, answer_budget=9)
    assert (answer.start().limit, answer.max_total_tokens, answer.may_continue) == (9, 9, False)


def test_an_end_after_a_closed_thought_is_the_end(tokenizer):
    answer = begin(tokenizer, think_budget=50, answer_budget=7)
    deltas, start = feed(answer, [*tokenizer.encode("<think>a</think>nothing more"), EOS], 3)
    assert start is None and deltas[-1].completion.finish_reason == "stop"
    assert deltas[-1].completion.answer == "nothing more"


def test_a_stop_string_ends_a_thought_for_good(tokenizer):
    answer = begin(tokenizer, think_budget=50, stop_strings=["STOP"], max_new_tokens=9)
    deltas, start = feed(answer, tokenizer.encode("<think>a STOP b"), 1, done=False)
    assert start is None and deltas[-1].completion.stop_string == "STOP"
    assert deltas[-1].completion.text == "<think>a "


def test_what_looked_like_a_stop_string_is_shown_in_the_end(tokenizer):
    answer = begin(tokenizer, stop_strings=["STOP"], max_new_tokens=9)
    deltas, _ = feed(answer, tokenizer.encode("a STO"), 1)
    assert deltas[-1].completion.text == "a STO" == "".join(delta.text for delta in deltas)
    assert deltas[-1].completion.finish_reason == "length"


def test_a_broken_character_at_the_end(tokenizer):
    answer = begin(tokenizer, max_new_tokens=9)
    half = tokenizer.encode("é")
    assert len(half) == 2
    deltas, _ = feed(answer, [*tokenizer.encode("caf"), half[0]], 1)
    assert deltas[-1].completion.text == "caf\ufffd" == "".join(delta.text for delta in deltas)


def test_deltas_have_the_log_probabilities_of_their_tokens(tokenizer):
    answer = begin(tokenizer, max_new_tokens=9, logprobs=1)
    tokens = [*tokenizer.encode("one two"), EOS]
    entries = [TokenLogprob(token, -1.0, ((token, -1.0),)) for token in tokens]
    first, _ = answer.take(tokens[:2], False, TokenLogprobs.of(entries[:2]))
    last, _ = answer.take(tokens[2:], True, TokenLogprobs.of(entries[2:]))
    assert first.logprobs == tuple(entries[:2]) and last.logprobs == tuple(entries[2:])
    assert last.completion.logprobs == tuple(entries)
