"""Prompts that begin alike share keys, and get what they would get without: equal tokens and log probabilities."""

import numpy as np
import pytest
from helpers_generation import GREEDY, Ready, random_request

from glm4v_jax.errors import GenerationError
from glm4v_jax.generate.engine import Request
from glm4v_jax.generate.prefill_chunks import Start
from glm4v_jax.generate.prefix_reuse import Prefix, RowContents
from glm4v_jax.generate.scheduler import run
from glm4v_jax.inputs.prompt import Prompt

CHUNK = 32


@pytest.fixture(scope="module")
def answers(make_engine):
    """Answer groups of prompts, one group after the other, with and without reuse; returns what was reused.

    Tokens and log probabilities are compared here.
    """

    def found(groups, interleave, **options):
        results, engines = [], []
        for reuse in (True, False):
            own = make_engine(reuse_prefixes=reuse, **options)
            slots = own.new_slots(8, own.config(logprobs=5))
            slots.use_chunks(CHUNK)
            done, index = [], 0
            for group in groups:
                sequences = []
                for prompt, given in group:
                    config = own.config(**GREEDY | dict(max_new_tokens=5, logprobs=2) | given)
                    sequences.append(own.new_sequence(own.prompt(prompt), config, index=index, number=index))
                    index += 1
                list(run(slots, Ready(sequences), interleave=interleave))
                done += [sequence.completion() for sequence in sequences]
            results.append([(one.tokens, one.logprobs) for one in done])
            engines.append(own)
        assert results[0] == results[1]
        own, other = (engine.stats for engine in engines)
        assert own.reused_tokens == other.prefill_tokens - own.prefill_tokens and other.reused_tokens == 0
        return own

    return found


def with_text(inputs, tokens):
    """A prompt that goes on after another."""
    return {**inputs, "input_ids": np.concatenate([inputs["input_ids"], [tokens]], axis=1)}


@pytest.mark.parametrize("interleave", [False, True])
def test_requests_about_an_image_share_its_keys(engine, answers, interleave):
    """Of 20 at once each row's first is prefilled from what another row holds, and each next from its own."""
    rng = np.random.default_rng(40)
    shared = random_request(engine.model, rng, 60, [(8, 8), (6, 8)])
    length = shared["input_ids"].size
    group = [(with_text(shared, rng.integers(0, 768, 20)), {}) for _ in range(20)]
    stats = answers([group], interleave)
    assert stats.reused_tokens == 19 * (length // CHUNK * CHUNK)


def test_a_second_turn_reuses_the_first(engine, answers):
    first = random_request(engine.model, np.random.default_rng(41), 90, [(8, 8)])
    length = first["input_ids"].size
    others = [(random_request(engine.model, np.random.default_rng(i), 70), {}) for i in range(3)]
    stats = answers([[(first, {})], others, [(with_text(first, range(50)), {})]], False)
    assert stats.reused_tokens == length // CHUNK * CHUNK


def test_samples_of_a_prompt_are_prefilled_once(engine, answers):
    """Whether they start together, or while others of them run; each draws by its own number."""
    prompt = random_request(engine.model, np.random.default_rng(42), 77)
    drawn = dict(do_sample=True, temperature=5.0, top_k=0, seed=3)
    stats = answers([[(prompt, drawn)] * 12, [(prompt, drawn | dict(repetition_penalty=1.5))]], True)
    assert stats.prefill_tokens == 77 and stats.reused_tokens == 12 * 77


def test_samples_are_prompts_given_several_times(engine, make_engine):
    own = make_engine()
    prompts = [random_request(engine.model, np.random.default_rng(i), 40, [(4, 4)]) for i in (45, 46)]
    options = dict(do_sample=True, temperature=5.0, top_k=0, eos_token_id=-1, max_new_tokens=6)
    seeded = Request(prompts[1], dict(seed=8))

    def found(requests, **more):
        many = own.generate_many(requests, **options, **more)
        return {one.index: one.tokens for one in many}

    each = found([prompts[0]] * 4 + [prompts[1]] * 4, seed=3)
    assert found(prompts, samples=4, seed=3) == each and len(set(each.values())) == 8
    first = found([seeded], samples=3)
    assert first[0] == own.generate(prompts[1], seed=8, **options).tokens and len(set(first.values())) == 3
    with pytest.raises(GenerationError, match="samples: found 0"):
        own.generate_many(prompts, samples=0)


@pytest.mark.slow
def test_prompts_of_a_family_get_what_they_get_without(engine, answers):
    """Random beginnings of few prompts, with random ends; integers in the cache do not matter."""
    rng = np.random.default_rng(43)
    stems = [random_request(engine.model, rng, 150)["input_ids"][0] for _ in range(3)]
    groups = []
    for _ in range(3):
        group = []
        for _ in range(12):
            stem = stems[rng.integers(3)][: rng.integers(1, 151)]
            end = rng.integers(0, 768, rng.integers(0, 3) * 25)
            group.append(({"input_ids": np.concatenate([stem, end])[None]}, dict(think_budget=3, answer_budget=4)))
        groups.append(group)
    for interleave, dtype in ((False, "auto"), (True, "int8")):
        assert answers(groups, interleave, cache_dtype=dtype).reused_tokens > 500


def test_a_cache_that_grew_is_not_reused(engine, make_engine):
    """Attention to more slots may round differently."""
    own = make_engine()
    prompt = own.prompt(random_request(engine.model, np.random.default_rng(44), 90))
    slots = own.new_slots(8, own.config())
    slots.use_chunks(CHUNK)
    slots.start({0: Start(prompt, own.config(), 1)})
    known = Prefix.of(prompt, CHUNK)
    assert slots._contents.source(known, 1) == (0, 90)
    slots.admit({1: Start(prompt, own.config(), 1000)})
    assert slots._contents.source(known, 1) == (1, 0)


def prefix(*tokens):
    return Prefix.of(Prompt.of_text(tokens), 2)


@pytest.mark.slow
def test_prompts_go_where_they_lose_least():
    contents = RowContents(6, 2)

    def hold(row, one):
        contents.cut(row, 0)
        contents.used([row])
        for begin, end in zip((0, *one.ends), (*one.ends, one.length), strict=True):
            if begin < end:
                contents.written(one, row, begin, end)

    hold(4, prefix(1, 2, 3, 4, 5))
    assert contents.choose(prefix(7, 8, 9), range(6)) == 0  # an empty row
    assert contents.choose(prefix(1, 2, 3, 4, 6), range(6)) == 4  # nothing is lost but the last token
    assert contents.choose(prefix(1, 2, 7, 8), range(6)) == 3  # 4 keeps what it has; 3 can copy from it
    assert contents.source(prefix(1, 2, 7, 8), 3) == (4, 2) and contents.source(prefix(1, 2, 7, 8), 0) == (0, 0)
    assert contents.source(prefix(1, 2, 3, 4), 3) == (4, 2)  # the state after the fourth token is not there
    assert contents.source(prefix(1, 2, 3, 4, 5), 4) == (4, 5)
    hold(3, prefix(9, 9, 9))
    hold(5, prefix(8, 8, 8))
    contents.used([3])
    assert contents.choose(prefix(1, 2, 7, 8), range(6)) == 4  # used least recently of those that can have it
    contents.cut(4, 3)
    assert contents.source(prefix(1, 2, 3, 4, 5), 4) == (4, 2)
    contents.forget()
    assert contents.source(prefix(1, 2, 3, 4, 5), 4) == (4, 0)
