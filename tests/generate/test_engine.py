"""The engine against itself and the reference: how tokens are made and batched must not show in them."""

import concurrent.futures
import dataclasses
import functools
import itertools

import jax
import numpy as np
import pytest
from helpers_checkpoints import RANDOM_CHECKPOINT
from helpers_generation import GREEDY, Ready, ask, random_request, random_requests, their_tokens

from glm4v_jax.config.generation import OF_BEAMS, OF_THE_MODEL, GenerationConfig, SamplingParams
from glm4v_jax.devices import stored_programs
from glm4v_jax.devices.mesh import use_mesh
from glm4v_jax.devices.stored_programs import StoredProgram
from glm4v_jax.errors import GenerationError, MediaError, MessageError
from glm4v_jax.generate import device_steps
from glm4v_jax.generate.completion import Completion
from glm4v_jax.generate.engine import Engine, Request
from glm4v_jax.generate.sampling import penalised, warped
from glm4v_jax.generate.scheduler import run
from glm4v_jax.generate.slots import MAX_STEPS, MIN_CAPACITY
from glm4v_jax.generate.warmup import warmup
from glm4v_jax.hf.generate import generate
from glm4v_jax.hf.model import Glm4vForConditionalGeneration
from glm4v_jax.model.kv_cache import QuantizedSide
from glm4v_jax.planning.hlo import MOVES, instructions


@pytest.mark.parametrize("is_text", [True, False])
def test_greedy_tokens_are_the_references(engine, their_tiny, image, is_text):
    prompt = [{"role": "user", "content": "Hello"}] if is_text else ask(image, "What is this?")
    inputs = engine.processor.apply_chat_template(prompt, add_generation_prompt=True, tokenize=True, return_dict=True)
    found = engine.generate(prompt, max_new_tokens=48, **GREEDY)
    assert list(found.tokens) == their_tokens(their_tiny, inputs, 48)
    assert found.prompt_tokens == inputs["input_ids"].shape[1]
    assert found.finish_reason == "length"


@pytest.fixture(scope="module")
def per_layer(engine):
    """An engine like `engine`, with layers one by one as on every CPU."""
    return Engine(Glm4vForConditionalGeneration.from_pretrained(RANDOM_CHECKPOINT), engine.processor, capacity=256)


def test_a_dispatch_copies_no_cache(engine, per_layer, monkeypatch):
    """On a CPU too, where XLA keeps what it believes is read after it was written."""
    texts = []
    decode = device_steps.decode

    def spy(*args, **kwargs):
        texts.append(decode.lower(*args, **kwargs).compile().as_text())
        return decode(*args, **kwargs)

    monkeypatch.setattr(device_steps, "decode", spy)
    found = per_layer.generate("Hello", max_new_tokens=3, **GREEDY)
    config = per_layer.runtime.config.text_config
    layer = 4 * config.num_key_value_heads * per_layer._capacity * config.head_dim  # of one row, in bytes
    moved = [one for one in instructions(texts[0]) if one.opcode in MOVES and one.nbytes >= layer]
    assert [one for one in moved if one.loops] == []
    assert found == engine.generate("Hello", max_new_tokens=3, **GREEDY)


def test_a_first_request_prepares_the_programs_that_it_runs_and_no_others(make_engine, image, monkeypatch):
    monkeypatch.setattr(stored_programs, "is_used", lambda: True)
    monkeypatch.setattr(stored_programs, "_cache", lambda: None)
    events, run, prepare = [], StoredProgram.__call__, StoredProgram.prepare

    def noted(self, event, args, kwargs):
        events.append((event, self.__name__, self._described(args, kwargs).key))

    monkeypatch.setattr(
        StoredProgram,
        "__call__",
        lambda self, *args, **kwargs: noted(self, "run", args, kwargs) or run(self, *args, **kwargs),
    )
    monkeypatch.setattr(
        StoredProgram,
        "prepare",
        lambda self, *args, **kwargs: noted(self, "prepared", args, kwargs) or prepare(self, *args, **kwargs),
    )
    engine = make_engine()
    engine.pool.forget(4)  # less than the image needs: programs are those of the pool after it has grown
    engine.generate(ask(image, "What is this?"), max_new_tokens=8, **GREEDY)
    assert engine.pool.capacity > 4
    prepared, ran = ({(name, key) for event, name, key in events if event == kind} for kind in ("prepared", "run"))
    assert {name for name, _ in prepared} == {"encode_wave", "prefill", "choose_first", "decode"}
    assert prepared <= ran

    events.clear()
    make_engine().generate(ask(image, "What is this?"), max_new_tokens=1, **GREEDY)
    assert {name for _, name, _ in events}.isdisjoint({"decode"}) and {name for _, name, _ in events} >= {"prefill"}


def test_a_first_token_that_is_the_last_is_not_decoded(engine):
    whole = engine.generate("Hello", max_new_tokens=3, logprobs=2, **GREEDY)
    before = engine.stats.dispatches
    found = engine.generate("Hello", max_new_tokens=1, logprobs=2, **GREEDY)
    assert engine.stats.dispatches == before
    assert (found.tokens, found.finish_reason) == (whole.tokens[:1], "length")
    assert found.logprobs == whole.logprobs[:1]
    beside = engine.generate_many([Request("Hello", dict(max_new_tokens=n)) for n in (1, 3, 1)], **GREEDY)
    assert [one.tokens for one in beside] == [whole.tokens[:n] for n in (1, 3, 1)]


SAMPLED = dict(max_new_tokens=45, temperature=3.0, top_k=0, top_p=1.0, do_sample=True, seed=5)


@pytest.fixture(scope="module")
def sampled(engine, image):
    """A prompt, and its completion with `SAMPLED`: long, with broken characters, as random models write them."""
    prompt = engine.prompt(ask(image, "Describe it."))
    completion = engine.generate(prompt, **SAMPLED)
    assert len(completion.tokens) > 20 and "\ufffd" in completion.text
    return prompt, completion


@pytest.mark.parametrize("steps", range(1, MAX_STEPS + 1))
def test_a_stream_equals_one_call_for_every_number_of_steps(make_engine, sampled, steps):
    prompt, completion = sampled
    deltas = list(make_engine(steps_per_dispatch=steps).stream(prompt, **SAMPLED))
    assert "".join(delta.text for delta in deltas) == completion.text
    assert [token for delta in deltas for token in delta.tokens] == list(completion.tokens)
    assert deltas[-1].completion == completion
    assert all(delta.completion is None for delta in deltas[:-1])
    assert len(deltas[0].tokens) <= steps + 1


def test_a_stream_with_its_default_number_of_steps_equals_one_call(engine, sampled):
    prompt, completion = sampled
    assert "".join(delta.text for delta in engine.stream(prompt, **SAMPLED)) == completion.text


def test_text_is_what_the_tokenizer_decodes(engine):
    found = engine.generate("Once", max_new_tokens=60, **GREEDY)
    kept = [token for token in found.tokens if token < 768 or token >= 784]
    assert found.text == engine.processor.decode(kept, skip_special_tokens=False, clean_up_tokenization_spaces=False)


@pytest.mark.slow
def test_100_prompts_through_8_slots_give_what_each_gives_alone(engine):
    rng = np.random.default_rng(11)
    requests = random_requests(engine.model, 100, seed=10)
    ends = rng.integers(0, 768, 8).tolist()
    options = [dict(max_new_tokens=int(rng.integers(1, 50))) for _ in requests]
    many = {
        found.index: found
        for found in engine.generate_many(
            [Request(*pair) for pair in zip(requests, options, strict=True)], do_sample=False, eos_token_id=ends
        )
    }
    assert sorted(many) == list(range(100))
    reasons = set()
    for index, (inputs, option) in enumerate(zip(requests, options, strict=True)):
        alone = engine.generate(inputs, do_sample=False, eos_token_id=ends, **option)
        assert many[index].tokens == alone.tokens, f"prompt {index}"
        assert many[index].text == alone.text and many[index].prompt_tokens == inputs["input_ids"].shape[1]
        reasons.add(alone.finish_reason)
    assert reasons == {"stop", "length"}


DRAWN = dict(max_new_tokens=12, do_sample=True, temperature=2.0, top_k=0, top_p=0.95, eos_token_id=-1)


@pytest.fixture(scope="module")
def drawn(engine):
    """20 prompts, and index -> tokens drawn with the seed 4 in eight slots."""
    requests = random_requests(engine.model, 20, seed=12)
    return requests, {found.index: found.tokens for found in engine.generate_many(requests, seed=4, **DRAWN)}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "seed", "same"), [(dict(num_slots=3, steps_per_dispatch=5), 4, True), ({}, 5, False)]
)
def test_draws_depend_on_the_seed_and_not_on_slots(make_engine, drawn, options, seed, same, monkeypatch):
    requests, expected = drawn
    if "num_slots" in options:  # chunks of one length: nearly all of the time is compiling
        for module in ("prefill_chunks", "slots"):
            monkeypatch.setattr(f"glm4v_jax.generate.{module}.MIN_LENGTH", 128)
    found = make_engine(**options).generate_many(requests, seed=seed, **DRAWN)
    assert ({one.index: one.tokens for one in found} == expected) is same


@pytest.mark.slow
def test_a_seed_of_a_request_draws_as_it_does_alone(engine, drawn):
    requests, _ = drawn
    seeded = [Request(inputs, dict(seed=30 + i)) for i, inputs in enumerate(requests)]
    for found in engine.generate_many(seeded, **DRAWN):
        assert found.tokens == engine.generate(requests[found.index], seed=30 + found.index, **DRAWN).tokens


@pytest.mark.slow
def test_equal_prompts_of_one_seed_draw_differently(engine, drawn):
    found = [one.tokens for one in engine.generate_many([drawn[0][0]] * 6, seed=4, **DRAWN)]
    assert len(set(found)) == 6


@pytest.mark.slow
def test_a_long_prompt_in_chunks(engine, monkeypatch, their_tiny):
    """Of many chunks, the last of which would reach beyond the cache; images are cut in two."""
    inputs = random_request(engine.model, np.random.default_rng(13), 150, [(8, 8), (4, 10)])
    expected = their_tokens(their_tiny, inputs, 24)
    assert list(engine.generate(inputs, max_new_tokens=24, **GREEDY).tokens) == expected
    for size in (32, 64):
        monkeypatch.setattr("glm4v_jax.generate.prefill_chunks.MAX_CHUNK", size)
        (many,) = engine.generate_many([inputs], max_new_tokens=24, **GREEDY)
        assert list(many.tokens) == list(engine.generate(inputs, max_new_tokens=24, **GREEDY).tokens) == expected


@pytest.mark.slow
def test_1500_tokens_equal_the_references(engine, their_tiny):
    inputs = random_request(engine.model, np.random.default_rng(14), 1450, [(8, 8)])
    found = engine.generate(inputs, max_new_tokens=8, **GREEDY)
    assert list(found.tokens) == their_tokens(their_tiny, inputs, 8)


def test_logprobs_are_the_models(engine, image):
    prompt = engine.processor.apply_chat_template(
        ask(image, "Why?"), add_generation_prompt=True, tokenize=True, return_dict=True
    )
    found = engine.generate(
        prompt, max_new_tokens=9, logprobs=3, do_sample=True, temperature=1.7, repetition_penalty=1.2
    )
    assert found.tokens == engine.generate(
        prompt, max_new_tokens=9, do_sample=True, temperature=1.7, repetition_penalty=1.2
    ).tokens  # fmt: skip
    ids = np.concatenate([prompt["input_ids"], [found.tokens]], axis=1)
    logits = np.asarray(engine.model(**{**prompt, "input_ids": ids, "attention_mask": np.ones_like(ids)}).logits)[0]
    logits = logits[prompt["input_ids"].shape[1] - 1 : -1].astype(np.float64)
    expected = logits - np.log(np.exp(logits - logits.max(-1, keepdims=True)).sum(-1, keepdims=True))
    expected -= logits.max(-1, keepdims=True)
    assert found.logprobs is not None and len(found.logprobs) == len(found.tokens)
    for token, entry, row in zip(found.tokens, found.logprobs, expected, strict=True):
        assert entry.token == token and entry.logprob == pytest.approx(row[token], rel=1e-5)
        assert [other for other, _ in entry.top] == np.argsort(-row, kind="stable")[:3].tolist()
        assert [value for _, value in entry.top] == pytest.approx(np.sort(row)[::-1][:3].tolist(), rel=1e-5)
    assert engine.generate(prompt, max_new_tokens=2).logprobs is None


@pytest.mark.slow
def test_logprobs_of_sampling_are_those_of_the_distribution_drawn_from(engine, image):
    """After penalty, bans, temperature and cuts; the tokens are the same."""
    prompt = engine.processor.apply_chat_template(
        ask(image, "Why?"), add_generation_prompt=True, tokenize=True, return_dict=True
    )
    options = dict(max_new_tokens=9, do_sample=True, temperature=1.7, repetition_penalty=1.2, top_k=30, top_p=0.9)
    free = engine.generate(prompt, **options)
    options |= dict(suppress_tokens=free.tokens[:3], eos_token_id=-1)
    found = engine.generate(prompt, logprobs=1, logprobs_of="sampling", **options)
    assert found.tokens == engine.generate(prompt, **options).tokens and not set(found.tokens) & set(free.tokens[:3])
    ids = np.concatenate([prompt["input_ids"], [found.tokens]], axis=1)
    logits = np.array(engine.model(**{**prompt, "input_ids": ids, "attention_mask": np.ones_like(ids)}).logits)[0]
    config, places = engine.config(**options), range(prompt["input_ids"].shape[1] - 1, ids.shape[1] - 1)
    params = SamplingParams.of(config, len(places))
    logits[:, list(config.suppress_tokens)] = -np.inf
    seen = np.array([np.isin(np.arange(logits.shape[1]), ids[0, : at + 1]) for at in places])
    scores = jax.jit(lambda *given: warped(penalised(*given), given[1]))(logits[list(places)], params, seen)
    for i, row in enumerate(np.asarray(scores, np.float64)):
        expected = row - np.log(np.exp(row).sum())
        assert found.logprob_array[i] == pytest.approx(expected[found.tokens[i]], rel=1e-4, abs=1e-5)
        assert found.logprobs[i].top[0][1] == pytest.approx(expected.max(), rel=1e-4, abs=1e-5)
    assert found.is_sampled.all() and found.logprob_array.dtype == np.float32


@pytest.fixture(scope="module")
def stopped(engine):
    """A completion, a stop string of two characters of one token and two of the next, and how many tokens it takes."""
    whole = engine.generate("Tell me", max_new_tokens=40, **GREEDY)
    pieces = [engine.processor.decode([token]) for token in whole.tokens]
    return next(
        (whole, stop, i + 2)
        for i in range(8, 30)
        if min(len(pieces[i]), len(pieces[i + 1])) > 2
        and whole.text.count(stop := pieces[i][-2:] + pieces[i + 1][:2]) == 1
    )


@pytest.mark.parametrize("steps", [1, 2, 5, MAX_STEPS])
def test_a_stop_string_across_tokens_ends_a_stream(make_engine, stopped, steps):
    whole, stop, count = stopped
    stream = make_engine(steps_per_dispatch=steps).stream
    deltas = list(stream("Tell me", max_new_tokens=40, stop_strings=["never", stop], **GREEDY))
    found = deltas[-1].completion
    assert found.text == "".join(delta.text for delta in deltas) == whole.text[: whole.text.index(stop)]
    assert (found.finish_reason, found.stop_string) == ("stop", stop)
    assert found.tokens == whole.tokens[:count]


def test_slots_that_stopped_for_a_string_take_the_next_prompt(engine, stopped):
    prompts, options = ["Tell me", "Hello", "Tell me"] * 5, dict(max_new_tokens=40, stop_strings=stopped[1], **GREEDY)
    for other in engine.generate_many(prompts, **options):
        alone = engine.generate(prompts[other.index], **options)
        assert (other.text, other.tokens, other.finish_reason) == (alone.text, alone.tokens, alone.finish_reason)


@pytest.fixture(scope="module")
def budgeted(engine, image):
    """A prompt, its first 20 tokens, and its updates with a thought of 20 tokens and an answer of 9."""
    prompt = engine.prompt(ask(image, "How many?"))
    free = engine.generate(prompt, max_new_tokens=20, **GREEDY)
    return prompt, free, list(engine.stream(prompt, think_budget=20, answer_budget=9, **GREEDY))


def test_a_think_budget_closes_the_thought(engine, budgeted):
    _, free, deltas = budgeted
    tokens = deltas[-1].completion.tokens
    close = engine.processor.tokenizer.encode("</think><answer>")
    assert tokens[:20] == free.tokens and list(tokens[20:22]) == close and len(tokens) == 31


def test_an_answer_after_a_closed_thought_is_that_of_the_text_as_a_prompt(engine, budgeted):
    prompt, free, deltas = budgeted
    found = deltas[-1].completion
    after = engine.generate(prompt.extended(list(found.tokens[:22])), max_new_tokens=9, **GREEDY)
    assert found.tokens[22:] == after.tokens
    assert found.parsed.thought == free.text.strip() and found.answer == after.text.strip()
    assert found.text == f"{free.text}</think><answer>{after.text}" == "".join(delta.text for delta in deltas)
    assert "".join(part.text for delta in deltas for part in delta.parts if part.kind == "answer") == after.text


def test_think_budgets_in_a_batch_with_prompts_without(engine, budgeted):
    prompt, free, deltas = budgeted
    mixed = [Request(prompt, dict(think_budget=20, answer_budget=9)), Request(prompt, dict(max_new_tokens=20))] * 6
    for other in engine.generate_many(mixed, **GREEDY):
        assert other.tokens == (free if other.index % 2 else deltas[-1].completion).tokens


SWITCH = "{% if enable_thinking is defined and not enable_thinking %}<think></think>\n{% endif %}"


@pytest.mark.parametrize("has_switch", [False, True])
def test_no_thought_is_the_templates_to_write_or_put_before_the_answer(engine, monkeypatch, has_switch):
    monkeypatch.setattr(engine.processor, "chat_template", engine.processor.chat_template + has_switch * SWITCH)
    encode, options = engine.processor.tokenizer.encode, dict(max_new_tokens=4, **GREEDY)
    empty = encode("<think></think>\n" if has_switch else "<think></think><answer>")
    prompt = engine.prompt("Hello")
    expected = engine.generate(prompt.extended(empty), **options)
    found = engine.generate("Hello", enable_thinking=False, **options)
    assert found.prompt_tokens == len(prompt) + has_switch * len(empty)
    assert list(found.tokens) == ([] if has_switch else empty) + list(expected.tokens)
    assert found == engine.generate("Hello", think_budget=0, **options)
    many = [Request("Hello", {"enable_thinking": False}), Request("Hello", {"think_budget": 0}), "Hello"]
    first, second, third = sorted(engine.generate_many(many, **options), key=lambda one: one.index)
    assert first.tokens == second.tokens == found.tokens and third.prompt_tokens == len(prompt)
    talk = engine.conversation(enable_thinking=False, **options)
    assert talk.send("Hello") == found and talk.messages[-1]["content"].strip() == found.answer


def test_tools_are_an_option_of_a_request(engine, monkeypatch):
    monkeypatch.setattr(engine.processor, "chat_template", "{{ tools }}" + engine.processor.chat_template)
    tools = [{"type": "function", "function": {"name": "f"}}]
    length = len(engine.prompt("Hello", tools=tools))
    assert length > len(engine.prompt("Hello")) + 10
    options = dict(max_new_tokens=1, **GREEDY)
    assert engine.generate("Hello", tools=tools, **options).prompt_tokens == length
    (one,) = engine.generate_many([Request("Hello", {"tools": tools})], **options)
    (two,) = engine.generate_many("Hello", tools=tools, **options)
    assert one.prompt_tokens == two.prompt_tokens == length


@pytest.mark.parametrize("stop", ["</think>", "<answer>"])
def test_a_stop_string_in_what_closes_a_thought_ends_the_answer(engine, stop):
    free = engine.generate("Think", max_new_tokens=9, **GREEDY)
    found = engine.generate("Think", think_budget=9, answer_budget=6, stop_strings=stop, **GREEDY)
    assert (found.finish_reason, found.stop_string, found.tokens) == ("stop", stop, free.tokens)
    assert found.text == free.text + ("" if stop == "</think>" else "</think>")


def test_an_end_token_within_a_budgeted_thought_closes_it(engine):
    free = engine.generate("Think", max_new_tokens=20, **GREEDY)
    last = next(i for i, token in enumerate(free.tokens) if i >= 4 and token not in free.tokens[:i])
    options = dict(do_sample=False, eos_token_id=free.tokens[last], think_budget=20, answer_budget=6)
    found = engine.generate("Think", **options)
    close = engine.processor.tokenizer.encode("</think><answer>")
    assert list(found.tokens[: last + 2]) == [*free.tokens[:last], *close]
    after = engine.generate(
        engine.prompt("Think").extended([*free.tokens[:last], *close]), max_new_tokens=6, do_sample=False,
        eos_token_id=free.tokens[last],
    )  # fmt: skip
    assert found.tokens[last + 2 :] == after.tokens


def test_a_repetition_is_stopped(engine):
    """A penalty below 1 makes the random model repeat itself."""
    options = dict(max_new_tokens=240, repetition_penalty=0.01, **GREEDY)
    whole = engine.generate("Again", **options)
    assert whole.finish_reason == "length" and len(set(whole.tokens[-50:])) < 4
    found = engine.generate("Again", stop_repetition=True, **options)
    assert found.finish_reason == "repetition" and 10 < len(found.tokens) < 240
    assert whole.text.startswith(found.text)


def test_a_thought_that_repeats_is_closed_and_answered(engine):
    options = dict(think_budget=230, answer_budget=4, repetition_penalty=0.01)
    found = engine.generate("Again", stop_repetition=True, **options, **GREEDY)
    assert found.parsed.is_thought_closed and found.finish_reason == "length" and len(found.tokens) < 200


SHORT = dict(max_new_tokens=30, **GREEDY)


@pytest.mark.parametrize("is_many", [False, True])
def test_closing_a_stream_leaves_the_engine_as_it_was(engine, is_many):
    before = engine.generate("Hello", **SHORT)
    started = engine.generate_many(["Hello"] * 20, **SHORT) if is_many else engine.stream("Hello", **SHORT)
    next(started)
    started.close()
    assert engine.generate("Hello", **SHORT) == before
    assert [found.tokens for found in engine.generate_many(["Hello"] * 9, **SHORT)] == [before.tokens] * 9


def test_two_streams_at_a_time_have_slots_of_their_own(engine):
    streams = [engine.stream(text, **SHORT) for text in ("Hello", "Again")]
    texts = ["", ""]
    while any(streams):
        for i, stream in enumerate(streams):
            delta = next(stream, None) if stream else None
            texts[i] += delta.text if delta else ""
            streams[i] = stream if delta else None
    assert texts == [engine.generate(text, **SHORT).text for text in ("Hello", "Again")]


def test_an_image_of_many_prompts_is_encoded_once(make_engine, image):
    own = make_engine()
    prompts = [ask(image, f"Question {i}") for i in range(12)]
    found = {one.index: one.tokens for one in own.generate_many(prompts, max_new_tokens=6, **GREEDY)}
    assert (own.pool.encoded, own.pool.reused) == (1, 11)
    for index, prompt in enumerate(prompts):
        assert found[index] == make_engine().generate(prompt, max_new_tokens=6, **GREEDY).tokens


def test_an_image_that_differs_in_a_pixel_is_encoded_too(make_engine, image):
    own, other = make_engine(), image.copy()
    other[0, 0, 0] ^= 255
    for shown in (image, other):
        own.generate(ask(shown, "Question 1"), max_new_tokens=2, **GREEDY)
    assert own.pool.encoded == 2


@pytest.mark.slow
def test_a_full_pool_drops_features_and_grows(engine, make_engine):
    from glm4v_jax.devices.mesh import use_mesh
    from glm4v_jax.generate.feature_pool import FeaturePool

    own = make_engine()
    with use_mesh(own.model.mesh):
        own.pool = FeaturePool(own.runtime, 128)
    requests = [
        random_request(own.model, np.random.default_rng(i), 6, [(8, 8), (4, 4)] * (1 + 6 * (i == 5))) for i in range(8)
    ]
    for inputs in requests:
        found = own.generate(inputs, max_new_tokens=5, **GREEDY)
        assert found.tokens == engine.generate(inputs, max_new_tokens=5, **GREEDY).tokens
    assert own.pool.capacity > 128


@pytest.mark.slow
def test_features_of_images_in_turn_are_kept_until_released(engine, make_engine):
    own = make_engine(reuse_prefixes=False)
    rng = np.random.default_rng(17)
    images = [rng.integers(0, 256, (336, 336, 3), np.uint8) for _ in range(5)]
    list(own.generate_many([ask(images[i % 5], "What?") for i in range(30)], max_new_tokens=1, **GREEDY))
    assert (own.pool.encoded, own.pool.reused) == (5, 25)
    own.release()
    list(own.generate_many([ask(images[0], "What?")], max_new_tokens=1, **GREEDY))
    assert own.pool.encoded == 6


def test_an_interrupted_encoder_leaves_the_engine_whole(engine, monkeypatch, image, make_engine):
    own = make_engine()
    expected = own.generate(ask(image, "What?"), max_new_tokens=4, **GREEDY).tokens
    other = image[::-1].copy()
    store = device_steps.store_features

    def interrupted(*args):
        store(*args)  # donates the pool
        raise KeyboardInterrupt

    monkeypatch.setattr(device_steps, "store_features", interrupted)
    with pytest.raises(KeyboardInterrupt):
        own.generate(ask(other, "What?"), max_new_tokens=4, **GREEDY)
    monkeypatch.undo()
    assert own.generate(ask(image, "What?"), max_new_tokens=4, **GREEDY).tokens == expected
    assert own.generate("Hello", max_new_tokens=4, **GREEDY).tokens


def test_threads_may_share_an_engine(engine, make_engine):
    own = make_engine()
    rng = np.random.default_rng(18)
    prompts = [ask(rng.integers(0, 256, (56, 84, 3), np.uint8), f"Question {i}") for i in range(12)]
    with concurrent.futures.ThreadPoolExecutor(4) as threads:
        found = list(threads.map(lambda prompt: own.generate(prompt, max_new_tokens=8, **GREEDY).tokens, prompts))
    assert found == [engine.generate(prompt, max_new_tokens=8, **GREEDY).tokens for prompt in prompts]


@pytest.mark.slow
def test_slots_grown_for_a_long_prompt_are_dropped(engine, make_engine):
    own = make_engine()
    own.generate(random_request(own.model, np.random.default_rng(19), 1450), max_new_tokens=3, **GREEDY)
    assert not own._free[1, None]
    for n in (1, 3, 5):
        own.generate("Hello", max_new_tokens=3, logprobs=n, **GREEDY)
    assert {key: len(free) for key, free in own._free.items()} == {(1, None): 0, (1, 5): 1}


def test_closing_after_a_stop_string_stops_its_slot(engine, make_engine):
    """The row of an answer that met its stop string is stopped although nobody asked for the next update."""
    whole = engine.generate("Tell me", max_new_tokens=40, **GREEDY)
    own = make_engine(num_slots=3)
    many = own.generate_many(["Tell me"] * 3, max_new_tokens=40, stop_strings=whole.text[9:12], **GREEDY)
    next(many)
    many.close()
    (slots,) = own._free[3, None]
    assert np.asarray(slots._state.row.done).all()


@pytest.fixture
def broken_prompts(tmp_path):
    return ["Hello", ask(str(tmp_path / "none.png"), "What?"), "Again", [{"role": "user", "content": 3}]]


def test_a_prompt_that_cannot_be_prepared_is_an_error(engine, broken_prompts):
    with pytest.raises(MediaError, match=r"prompt 1: .*none\.png"):
        list(engine.generate_many(broken_prompts, max_new_tokens=3, **GREEDY))


def test_prompts_that_cannot_be_prepared_may_be_skipped(engine, broken_prompts):
    many = engine.generate_many(broken_prompts, skip_errors=True, max_new_tokens=3, **GREEDY)
    found = {one.index: one for one in many}
    assert [found[i].finish_reason for i in range(4)] == ["length", "error", "length", "error"]
    assert "none.png" in found[1].error and found[1].tokens == ()
    assert found[2].tokens == engine.generate("Again", max_new_tokens=3, **GREEDY).tokens


def test_no_prompts_have_no_completions(engine):
    assert list(engine.generate_many([])) == []


def test_an_error_is_reported_as_soon_as_it_is_known(engine):
    def endless():
        yield {"a": 1}
        while True:
            yield "Hello"

    first = next(engine.generate_many(endless(), skip_errors=True, max_new_tokens=3, **GREEDY))
    assert (first.index, first.finish_reason) == (0, "error") and "input_ids" in first.error


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(preset="fast"), "preset: found 'fast'; expected one of cli"),
        (dict(temprature=1.0), "unknown 'temprature'"),
        (dict(num_return_sequences=2, do_sample=True), "num_return_sequences: found 2"),
        (dict(num_beams=2, do_sample=False), "num_beams: found 2"),
        (dict(length_penalty=2.0), "length_penalty: found 2.0; expected none: of beam search"),
        (dict(early_stopping="never"), "early_stopping: found 'never'; expected none"),
        (dict(max_new_tokens=70_000), "max_new_tokens: found 70000"),
        (dict(think_budget=60_000, answer_budget=10_000), "think_budget: found 60,000"),
        (dict(answer_budget=5), "answer_budget: found 5; expected think_budget beside it"),
        (dict(stop_strings=[""]), "stop_strings"),
        (dict(logprobs=65), "logprobs: found 65"),
        (dict(logprobs=-1), "logprobs: found -1"),
        (dict(think_budget=-1), "think_budget: found -1; expected an integer of at least 0"),
        (dict(enable_thinking="no"), "enable_thinking: found 'no'"),
        (dict(tools="add"), "tools: found 'add'; expected a list of objects"),
        (dict(tools=[{"function": {}}]), r"tools: found \{'function': \{\}\}; expected objects with function.name"),
        (dict(think_budget=1, answer_budget=0), "answer_budget: found 0; expected an integer of at least 1"),
        (dict(suppress_tokens=[832]), "found 832; expected tokens below 832"),
    ],
)
def test_impossible_options_are_refused_before_anything_is_computed(engine, options, message):
    with pytest.raises(GenerationError, match=message):
        engine.stream("Hello", **options)


@pytest.mark.parametrize(
    ("ids", "message"), [(np.ones((2, 3), np.int64), "found 2 prompts"), (np.array([[5000]]), "token 5000")]
)
def test_impossible_prompts_are_refused(engine, ids, message):
    with pytest.raises(MessageError, match=message):
        engine.generate({"input_ids": ids})


def test_special_tokens_that_a_user_types_are_text(engine, image):
    """In a prompt as a string, in messages beside an image, and in a conversation."""
    typed, tokenizer = "<|image|> or <|user|>?", engine.processor.tokenizer
    message = {"role": "user", "content": [{"type": "image", "image": image}, {"type": "text", "text": typed}]}
    for prompt in (typed, [message]):
        prepared = engine.prompt(prompt)
        assert len(prepared.media) == (prompt is not typed)
        assert tokenizer.decode(prepared.input_ids).endswith(f"{typed}<|assistant|>\n")
        assert prepared.input_ids.tolist().count(tokenizer.convert_tokens_to_ids("<|user|>")) == 1
    talk = engine.conversation(max_new_tokens=1, **GREEDY)
    assert talk.send(typed).prompt_tokens == len(engine.prompt(typed))
    assert talk.send(typed, images=[image]).prompt_tokens > len(prepared)


def test_an_engine_has_at_least_one_slot(make_engine):
    with pytest.raises(GenerationError, match="num_slots: found 0"):
        make_engine(num_slots=0)


@pytest.mark.parametrize("cls", [Engine, Glm4vForConditionalGeneration])
def test_an_unknown_option_of_loading_is_named(cls):
    with pytest.raises(TypeError, match=r"from_pretrained: found an unknown 'dtpye'; .*; did you mean 'dtype'"):
        cls.from_pretrained(RANDOM_CHECKPOINT, dtpye="float32")
    with pytest.raises(TypeError, match=r"from_pretrained: found an unknown 'device_map'; expected some of adapter, "):
        cls.from_pretrained(RANDOM_CHECKPOINT, device_map="auto")


@pytest.mark.parametrize("name", ["output_scores", "output_logits", "return_dict_in_generate"])
def test_what_only_the_model_returns_is_refused_where_it_is_asked_for(engine, make_engine, name):
    with pytest.raises(GenerationError, match=f"{name}: found True; expected it in model.generate alone; logprobs=N"):
        engine.stream("Hello", **{name: True})


def test_one_prompt_needs_no_list(engine, image):
    conversation = ask(image, "What?")
    inputs = engine.processor.apply_chat_template(
        conversation, add_generation_prompt=True, tokenize=True, return_dict=True
    )
    options = {"max_new_tokens": 2, **GREEDY}
    for one in ("What?", conversation, conversation[0], inputs, engine.prompt("What?"), Request("What?")):
        (found,) = engine.generate_many(one, **options)
        assert found.tokens == engine.generate(one.prompt if isinstance(one, Request) else one, **options).tokens
    assert len(list(engine.generate_many(["a", conversation], **options))) == 2


def test_boxes_are_pixels_of_the_original_image(engine, image):
    found = engine.generate(ask(image, "Where?"), max_new_tokens=2, **GREEDY)
    assert found.image_sizes == ((100, 70),)
    made = Completion(
        0, "<answer><|begin_of_box|>[[100, 200, 500, 1000]]<|end_of_box|>", (), 0, "stop", image_sizes=((100, 70),)
    )
    assert made.boxes == [(100, 200, 500, 1000)] and made.pixel_boxes() == [(10, 14, 50, 70)]


CONSTRAINED = [
    dict(no_repeat_ngram_size=2),
    dict(suppress_tokens=list(range(0, 832, 3))),
    dict(bad_words_ids=[[5, 6], [7]], sequence_bias={(9,): 2.0, (9, 9): -1.0}),
    dict(min_new_tokens=20, eos_token_id=list(range(0, 64, 8))),
    {},
]


@pytest.mark.slow
def test_requests_with_and_without_constraints_share_slots(engine, lowerings):
    def plain():
        list(engine.generate_many(["Hello"] * 3, max_new_tokens=24, **GREEDY))
        engine.generate("Hello", max_new_tokens=24, **GREEDY)

    plain()
    prompts = random_requests(engine.model, 10, seed=21)
    requests = [Request(inputs, CONSTRAINED[i % 5]) for i, inputs in enumerate(prompts)]
    many = {one.index: one.tokens for one in engine.generate_many(requests, max_new_tokens=24, **GREEDY)}
    changed = 0
    for index, request in enumerate(requests):
        found = many[index]
        assert found == engine.generate(request.prompt, **{**GREEDY, **request.options}, max_new_tokens=24).tokens
        changed += found != engine.generate(request.prompt, max_new_tokens=24, **GREEDY).tokens
        if "no_repeat_ngram_size" in request.options:
            whole = [*request.prompt["input_ids"][0].tolist(), *found]
            pairs = list(itertools.pairwise(whole))
            assert all(pairs.count(pair) == 1 for pair in pairs[-24:])
    assert changed >= 5
    # Without such requests the ordinary programs run.
    with lowerings() as lowered:
        plain()
    assert lowered == []
    assert all(slots._constraints is None for slots in engine._free[8, None] + engine._free[1, None])


def test_a_function_is_one_for_all_requests_of_a_batch(engine):
    def first(tokens, scores):
        return scores.at[:, 3].set(1e9)

    assert engine.generate("Hello", max_new_tokens=3, logits_processor=first, **GREEDY).tokens == (3, 3, 3)
    talk = engine.conversation(max_new_tokens=3, **GREEDY)
    assert talk.send("Hello", logits_processor=first).tokens == (3, 3, 3)
    assert talk.send("Hello").tokens != (3, 3, 3)
    with pytest.raises(GenerationError, match="logits_processor: found an option of one prompt; expected one for all"):
        list(engine.generate_many([Request("Hello", dict(logits_processor=first))]))


LARGEST = float(np.finfo(np.float32).max)
LIKE_GREEDY = [dict(top_k=1), dict(top_p=1e-30), dict(min_p=1.0), dict(temperature=1e-30)]
EXTREMES = [
    *LIKE_GREEDY, dict(top_k=0), dict(top_k=832), dict(top_k=2**40), dict(top_p=1.0), dict(min_p=0.0),
    dict(temperature=LARGEST), dict(do_sample=False, temperature=0), dict(do_sample=False, temperature=LARGEST),
    dict(repetition_penalty=1e-30), dict(repetition_penalty=LARGEST), dict(seed=0), dict(seed=2**32 - 1),
    dict(max_new_tokens=1), dict(max_new_tokens=150), dict(max_new_tokens=None, max_length=150),
    dict(min_new_tokens=0), dict(min_new_tokens=2**40, eos_token_id=[1]), dict(no_repeat_ngram_size=1),
    dict(no_repeat_ngram_size=2**40), dict(bad_words_ids=[[0]]), dict(bad_words_ids=[[831] * 5] * 99),
    dict(suppress_tokens=[0]), dict(suppress_tokens=[token for token in range(832) if token != 5]),
    dict(sequence_bias={(5,): -float("inf")}), dict(sequence_bias={(5,): LARGEST}),
    dict(eos_token_id=[]), dict(eos_token_id=list(range(8))), dict(pad_token_id=0), dict(use_cache=False),
    dict(stop_strings="e"), dict(stop_strings=["x" * 10_000] * 100), dict(stop_repetition=True), dict(logprobs=0),
    dict(logprobs=64), dict(prompt_lookup_num_tokens=1), dict(prompt_lookup_num_tokens=2**40),
    dict(think_budget=1, answer_budget=1), dict(think_budget=60, answer_budget=90), dict(json_schema={}),
    dict(regex="(.|\n)*"), dict(choices=[str(number) for number in range(1000)]),
]  # fmt: skip
ELSEWHERE = {"logprobs_of", "logits_processor", "num_return_sequences", *OF_THE_MODEL, *OF_BEAMS}


@pytest.mark.slow
@pytest.mark.parametrize("options", EXTREMES, ids=lambda options: str(options)[:40])
def test_the_smallest_and_the_largest_of_every_option_run(engine, options):
    base = dict(max_new_tokens=6, do_sample=True, top_k=0, top_p=1.0, temperature=2.0, eos_token_id=-1)
    found = engine.generate("Hello", **{**base, **options})
    config = engine.config(**{**base, **options})
    assert found.tokens and all(0 <= token < 832 for token in found.tokens)
    assert len(found.tokens) <= 160 and found.finish_reason in ("stop", "length", "repetition")
    if found.finish_reason == "length" and config.think_budget is None:
        assert len(found.tokens) == config.new_tokens(found.prompt_tokens)
    if options in LIKE_GREEDY:
        assert found.tokens == engine.generate("Hello", max_new_tokens=6, **GREEDY).tokens
    if "logprobs" in options:
        assert [len(entry.top) for entry in found.logprobs] == [options["logprobs"]] * 6
        assert all(entry.logprob <= 0 for entry in found.logprobs)
    if options.get("suppress_tokens", [0]) != [0] or options.get("sequence_bias") == {(5,): LARGEST}:
        assert found.tokens == (5,) * 6


def test_every_option_is_run_with_its_extremes():
    fields = {field.name for field in dataclasses.fields(GenerationConfig)}
    assert {name for options in EXTREMES for name in options} | ELSEWHERE == fields


@pytest.fixture(scope="module")
def int8(make_engine):
    """Two slots whose keys and values are integers."""
    return make_engine(num_slots=2, cache_dtype="int8")


@pytest.mark.slow
def test_an_int8_cache_answers_alike_in_slots_in_chunks_and_alone(int8, monkeypatch):
    """Nobody sees keys before they are rounded, so it does not matter what was computed together."""
    rng = np.random.default_rng(22)
    prompts = [random_request(int8.model, rng, text, [(8, 8), (4, 6)]) for text in (140, 151, 162)]
    options = dict(max_new_tokens=24, **GREEDY)
    found = {one.index: list(one.tokens) for one in int8.generate_many(prompts, **options)}
    (slots,) = int8._free[2, None]
    assert all(isinstance(side, QuantizedSide) for side in (slots._state.cache.k, slots._state.cache.v))
    for index, inputs in enumerate(prompts):
        alone = generate(int8.runtime, **inputs, cache_dtype="int8", **options)
        assert alone[0, inputs["input_ids"].shape[1] :].tolist() == found[index]
    monkeypatch.setattr("glm4v_jax.generate.prefill_chunks.MAX_CHUNK", 64)
    assert list(int8.generate(prompts[0], **options).tokens) == found[0]


@pytest.mark.slow
def test_a_conversation_with_an_int8_cache_answers_as_if_it_had_none(int8):
    talk = int8.conversation(max_new_tokens=12, **GREEDY)
    talk.send("Hello")
    assert talk.in_cache is not None
    again = talk.send("Again")
    assert again.tokens == int8.generate(talk.messages[:-1], max_new_tokens=12, **GREEDY).tokens


@pytest.mark.slow
def test_drafts_and_beams_with_an_int8_cache(int8):
    """Lookup gives what decoding one by one does; beams have the scores that the model gives them."""
    inputs = random_request(int8.model, np.random.default_rng(23), 170, [(8, 8)])
    # A penalty below 1 makes a random model repeat what it has read.
    options = dict(max_new_tokens=24, repetition_penalty=0.01, **GREEDY)
    assert int8.generate(inputs, prompt_lookup_num_tokens=4, **options) == int8.generate(inputs, **options)
    beams = dict(num_beams=3, num_return_sequences=3, return_dict_in_generate=True, output_scores=True)
    options = dict(max_new_tokens=6, cache_dtype="int8", **GREEDY)
    found = generate(int8.runtime, **inputs, **options, **beams)
    best = generate(int8.runtime, **inputs, **options, return_dict_in_generate=True, output_logits=True)
    logprobs = [jax.nn.log_softmax(logits[0]) for logits in best.logits]
    chosen = [x[token] for x, token in zip(logprobs, best.sequences[0, -6:], strict=True)]
    assert np.isfinite(found.sequences_scores).all() and len(np.unique(found.sequences, axis=0)) == 3
    assert found.sequences_scores[0] >= np.mean(chosen) - 1e-5


def test_a_decode_step_makes_no_floats_of_an_int8_cache(per_layer):
    """Floats of one of the two layers would take twice the memory of all integers."""
    rows, slots = 2, 8192
    text, head = per_layer.runtime.text, per_layer.runtime.head
    with use_mesh(per_layer.runtime.mesh):
        make = functools.partial(device_steps.init_state, stacked=False, cache_dtype="int8")
        state = jax.eval_shape(lambda text: make(text, rows, slots, 8), text)
        number = jax.ShapeDtypeStruct((), np.int32)
        memory = device_steps.decode.lower(text, head, state, number, number, num_steps=4).compile().memory_analysis()
    nbytes = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves((state.cache.k, state.cache.v)))
    config = per_layer.runtime.config.text_config
    assert nbytes == 2 * rows * slots * config.num_hidden_layers * config.num_key_value_heads * (config.head_dim + 4)
    assert memory.alias_size_in_bytes > nbytes  # written in place
    assert memory.temp_size_in_bytes < nbytes


def test_an_unknown_cache_dtype_is_refused(engine, make_engine):
    message = "cache_dtype: found 'int4'; expected one of 'auto', 'int8'"
    with pytest.raises(GenerationError, match=message):
        make_engine(cache_dtype="int4")
    with pytest.raises(GenerationError, match=message):
        Engine.from_pretrained("nowhere", cache_dtype="int4")
    with pytest.raises(GenerationError, match=message):
        generate(engine.runtime, np.array([[1]]), cache_dtype="int4")
    with pytest.raises(GenerationError, match=message):
        warmup(engine.runtime, prompt_lengths=1, cache_dtype="int4")


@pytest.mark.slow
def test_the_smallest_engine_warms_up_and_answers(make_engine):
    own = make_engine(num_slots=1, capacity=1, steps_per_dispatch=1)
    own.warmup(prompt_lengths=(1, 1), max_new_tokens=1, logprobs=0, progress=lambda _: None)
    (found,) = own.generate_many([{"input_ids": np.array([[5]])}], max_new_tokens=1, logprobs=0, **GREEDY)
    expected = own.generate({"input_ids": np.array([[5]])}, max_new_tokens=1, logprobs=1, **GREEDY)
    (entry,) = found.logprobs
    assert entry.top == () and (entry.token, entry.logprob) == expected.logprobs[0].top[0]


@pytest.mark.slow
def test_an_engine_compiles_nothing_after_warm_up(engine, lowerings, image, make_engine):
    own = make_engine(capacity=MIN_CAPACITY)
    told = []
    done = own.warmup(prompt_lengths=(1, 64), vision_patches=(4, 256), max_new_tokens=40, progress=told.append)
    assert told == done and {line.program for line in done} == {"encode", "prefill", "copy", "decode"}
    requests = [one for one in random_requests(own.model, 24, seed=16) if one["input_ids"].shape[1] <= 64]
    requests = [*requests[:12], "Hello", "Hello"]
    assert len(requests) == 14 and sum("pixel_values" in one for one in requests[:12]) > 2
    config = own.config(max_new_tokens=9, **GREEDY)
    with lowerings() as lowered:
        list(own.generate_many(requests, max_new_tokens=40, **GREEDY))
        with own.lend_slots(8, config, chunk=32) as slots:
            sequences = [own.new_sequence(own.prompt(request), config) for request in requests * 2]
            list(run(slots, Ready(sequences), interleave=True))
        assert own.stats.reused_tokens > 0
        own.generate(ask(image, "What?"), max_new_tokens=9, do_sample=True, seed=3)
        talk = own.conversation(max_new_tokens=4, do_sample=True)
        talk.send("Look", images=[image])
        talk.send("And?")
    assert lowered == []


@pytest.mark.slow
def test_requests_with_constraints_compile_nothing_after_a_warm_up_for_them(lowerings, make_engine):
    own = make_engine(num_slots=2, capacity=MIN_CAPACITY)
    options = dict(no_repeat_ngram_size=3)
    done = own.warmup(prompt_lengths=(1, 32), max_new_tokens=8, progress=lambda _: None, **options)
    assert sum("constraints" in line.shape for line in done) == 2
    with lowerings() as lowered:
        list(own.generate_many(["Hello", Request("Again", options)] * 2, max_new_tokens=8, **GREEDY))
        own.generate("Hello", max_new_tokens=8, min_new_tokens=4, eos_token_id=[1])
    assert lowered == []


def test_closing_after_an_error_stops_the_running_requests(engine):
    prompts = ["Hello", ask("nowhere.png", "What?"), "Again"]
    found = engine.generate_many(prompts, max_new_tokens=200, skip_errors=True, **GREEDY)
    first = next(found)
    found.close()
    assert "nowhere.png" in first.error
    (again,) = engine.generate_many(["Hello"], max_new_tokens=6, **GREEDY)
    assert again.tokens == engine.generate("Hello", max_new_tokens=6, **GREEDY).tokens
