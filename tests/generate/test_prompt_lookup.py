"""Prompt lookup against decoding one by one: the same tokens in fewer steps, whatever is in the batch."""

import jax
import numpy as np
import pytest
from helpers_generation import GREEDY, random_requests
from reference import Prompts, to_torch

from glm4v_jax.devices.mesh import reshard
from glm4v_jax.errors import GenerationError
from glm4v_jax.generate import prefill_chunks, slots
from glm4v_jax.generate.device_steps import RowState, SlotsState
from glm4v_jax.generate.engine import Request
from glm4v_jax.generate.prompt_lookup import _look_up
from glm4v_jax.model.kv_cache import KVCache

pytestmark = pytest.mark.slow

LOOKUP = dict(prompt_lookup_num_tokens=4)
# A penalty below 1 makes a random model repeat what it has read.
REPEATING = dict(repetition_penalty=0.01)


def tokens(completions):
    return [one.tokens for one in sorted(completions, key=lambda one: one.index)]


def test_a_draft_is_what_followed_the_newest_tokens_before(mesh):
    expected = {
        "abcdxyzab": "cdxy",
        "abcdabxyab": "xyab",  # of equal places the last
        "qabcdrabxyqab": "cdra",  # but rather one with more before it
        "xababab": "abab",  # what reaches the end continues from its beginning
        "xaaa": "aaaa",
        "abcdefa": None,  # one token is too few
        "ab": None,
        "a": None,
    }
    row = RowState.free(len(expected) + 1, 1)
    row.done[:-1] = False
    texts = [*expected, "xaaa"]  # the last is done
    history = np.array([list(text.ljust(16, "a").encode()) for text in texts], np.int32)
    length = np.array([len(text) - 1 for text in texts], np.int32)

    @jax.jit
    def look_up(history, length):
        cache = KVCache((), (), history, reshard(length, "batch"))
        return _look_up(SlotsState(cache, None, None, row), reshard(history, "batch", None), 4)

    draft, found = (look_up(history, length)[name].tolist() for name in ("draft", "found"))
    drafts = [bytes(tokens).decode() if there else None for tokens, there in zip(draft, found, strict=True)]
    assert dict(zip(expected, drafts[:-1], strict=True)) == expected and drafts[-1] is None


@pytest.mark.parametrize(
    "options",
    [
        {},
        REPEATING,
        dict(do_sample=True, temperature=0.9, top_p=0.9, seed=3) | REPEATING,
        dict(do_sample=True, temperature=3.0, top_k=0, seed=4),
        dict(no_repeat_ngram_size=3, min_new_tokens=9, eos_token_id=[*range(200)], suppress_tokens=[310]) | REPEATING,
    ],
)
def test_rows_of_all_modalities_get_the_tokens_of_plain_decoding(engine, options, monkeypatch):
    for module in (prefill_chunks, slots):  # chunks of few lengths: nearly all of the time is compiling
        monkeypatch.setattr(module, "MIN_LENGTH", 128)
    requests = random_requests(engine.model, 20, 3)
    requests = [Request(inputs, dict(max_new_tokens=3 + 5 * (i % 5))) for i, inputs in enumerate(requests)]
    options = GREEDY | options
    assert tokens(engine.generate_many(requests, **LOOKUP, **options)) == tokens(
        engine.generate_many(requests, **options)
    )


def test_what_repeats_takes_fewer_steps(make_engine):
    engine = make_engine()
    options = dict(max_new_tokens=150, **REPEATING, **GREEDY)
    plain = engine.generate("Again", **options)
    before = engine.stats.slot_steps
    assert before == 149
    assert engine.generate("Again", **LOOKUP, **options).tokens == plain.tokens
    assert 149 / 5 <= engine.stats.slot_steps - before < 149 / 2


@pytest.fixture(scope="module")
def prompts(ours):
    return Prompts(ours("base").config, [[12], [3, ("image", (4, 6)), 9], [5]], seed=2)


def test_tokens_are_those_of_the_references_prompt_lookup(ours, theirs, prompts):
    """Which takes one row."""
    import torch

    asked = dict(max_new_tokens=40, do_sample=False, pad_token_id=0, eos_token_id=[318, 319], **LOOKUP)
    scored = dict(return_dict_in_generate=True, output_scores=True)  # the programs of the next test
    alone = prompts.inputs | {name: prompts.inputs[name][1:2] for name in ("input_ids", "attention_mask")}
    with torch.no_grad():
        expected = theirs("base").generate(**to_torch(alone), **asked)
    found = ours("base").generate(**prompts.inputs, **asked, **scored)
    assert np.array_equal(found.sequences[1:2], expected.numpy())


def test_rows_that_copy_more_wait_for_the_others(ours, prompts):
    """In what `model.generate` returns and streams: every step has a token of each row that has not ended."""
    model = ours("base")
    asked = dict(max_new_tokens=40, do_sample=False, pad_token_id=0, return_dict_in_generate=True, output_scores=True)

    class Steps(list):
        put = list.append

        def end(self):
            pass

    plain = model.generate(**prompts.inputs, eos_token_id=44, **asked)
    found = model.generate(**prompts.inputs, eos_token_id=44, streamer=(steps := Steps()), **asked, **LOOKUP)
    assert np.array_equal(found.sequences, plain.sequences) and (plain.sequences[:, -1] == 0).any()
    assert np.array_equal(np.stack(steps[1:], axis=1), found.sequences[:, steps[0].shape[1] :])
    for one, other in zip(found.scores, plain.scores, strict=True):
        np.testing.assert_allclose(one, other, rtol=0, atol=1e-4)


@pytest.mark.parametrize("draft", [1, 10])
def test_drafts_of_any_length_give_the_same_tokens(engine, draft):
    options = dict(max_new_tokens=40, **REPEATING, **GREEDY)
    found = engine.generate("Again", prompt_lookup_num_tokens=draft, **options)
    assert found.tokens == engine.generate("Again", **options).tokens


def test_what_ends_a_sequence_ends_it_within_a_draft(engine):
    """End tokens, stop strings and think budgets."""
    options = dict(max_new_tokens=100, **REPEATING) | GREEDY
    whole = engine.generate("Again", **options)
    last = max(range(60), key=lambda i: whole.tokens.index(whole.tokens[i]))
    ends = [
        dict(eos_token_id=whole.tokens[last]), dict(stop_strings=whole.text[-60:-50]),
        dict(think_budget=50, answer_budget=7),
    ]  # fmt: skip
    for end in ends:
        assert engine.generate("Again", **options | end | LOOKUP) == engine.generate("Again", **options | end)


def test_the_next_turn_of_a_conversation_looks_up_in_all_of_it(make_engine):
    engine = make_engine()
    options = dict(max_new_tokens=30, **REPEATING, **GREEDY)
    answers = []
    for lookups in ([{}, {}], [LOOKUP, LOOKUP], [{}, LOOKUP]):
        talk = engine.conversation(**options)
        answers.append(
            [talk.send(text, **lookup).tokens for text, lookup in zip(["Hello", "Again?"], lookups, strict=True)]
        )
    assert answers[0] == answers[1] == answers[2]


def test_logprobs_of_drafted_tokens_are_those_of_plain_decoding(engine):
    options = dict(max_new_tokens=40, logprobs=2, **REPEATING, **GREEDY)
    plain, found = engine.generate("Again", **options), engine.generate("Again", **options, **LOOKUP)
    assert found.tokens == plain.tokens
    for one, other in zip(found.logprobs, plain.logprobs, strict=True):
        assert one.token == other.token and one.logprob == pytest.approx(other.logprob, abs=1e-4)
        assert [token for token, _ in one.top] == [token for token, _ in other.top]


def test_lookup_is_of_all_requests(engine):
    with pytest.raises(GenerationError, match="prompt_lookup_num_tokens: found an option of one prompt"):
        next(engine.generate_many([Request("Hello", LOOKUP)]))


def test_a_warm_engine_compiles_nothing_for_lookup(make_engine, lowerings):
    engine = make_engine()
    engine.warmup(prompt_lengths=(1, 32), max_new_tokens=40, many=False, progress=lambda _: None, **LOOKUP)
    with lowerings() as lowered:
        engine.generate("Again", max_new_tokens=40, **LOOKUP, **REPEATING, **GREEDY)
        engine.generate("Hello", max_new_tokens=20, do_sample=True, seed=3, **LOOKUP)
    assert lowered == []
