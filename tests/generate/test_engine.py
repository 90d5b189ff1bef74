"""The engine against itself and the reference: how tokens are made and batched must not show in them."""

import concurrent.futures
import heapq

import numpy as np
import pytest
from helpers_generation import GREEDY, ask, random_request, random_requests, their_tokens

from glm4v_jax.errors import GenerationError, MediaError, MessageError
from glm4v_jax.generate import device_steps
from glm4v_jax.generate.completion import Completion
from glm4v_jax.generate.engine import Engine, Request
from glm4v_jax.generate.scheduler import Failure, SharedQueue, run
from glm4v_jax.generate.slots import MAX_STEPS, Slots


@pytest.fixture(scope="module")
def picture():
    return np.random.default_rng(3).integers(0, 256, (70, 100, 3), np.uint8)


def test_greedy_tokens_are_the_references(engine, their_tiny, picture):
    for prompt in (ask(picture, "What is this?"), [{"role": "user", "content": "Hello"}]):
        inputs = engine.processor.apply_chat_template(
            prompt, add_generation_prompt=True, tokenize=True, return_dict=True
        )
        found = engine.generate(prompt, max_new_tokens=48, **GREEDY)
        assert list(found.tokens) == their_tokens(their_tiny, inputs, 48)
        assert found.prompt_tokens == inputs["input_ids"].shape[1]
        assert found.finish_reason == "length"


def test_streams_equal_one_call_for_every_number_of_steps(engine, picture):
    prompt = engine.prompt(ask(picture, "Describe it."))
    whole = engine.generate(prompt, max_new_tokens=45, temperature=3.0, top_k=0, top_p=1.0, do_sample=True, seed=5)
    assert len(whole.tokens) > 20 and "\ufffd" in whole.text  # broken characters, as random models write them
    for steps in range(1, MAX_STEPS + 1):
        small = Engine(engine.model, engine.processor, capacity=256, steps_per_dispatch=steps)
        deltas = list(
            small.stream(prompt, max_new_tokens=45, temperature=3.0, top_k=0, top_p=1.0, do_sample=True, seed=5)
        )
        assert "".join(delta.text for delta in deltas) == whole.text
        assert [token for delta in deltas for token in delta.tokens] == list(whole.tokens)
        assert deltas[-1].completion == whole
        assert all(delta.completion is None for delta in deltas[:-1])
        assert len(deltas[0].tokens) <= steps + 1
    # By default a stream finds its own pace.
    assert "".join(
        delta.text
        for delta in engine.stream(
            prompt, max_new_tokens=45, temperature=3.0, top_k=0, top_p=1.0, do_sample=True, seed=5
        )
    ) == whole.text  # fmt: skip


def test_text_is_what_the_tokenizer_decodes(engine):
    found = engine.generate("Once", max_new_tokens=60, **GREEDY)
    kept = [token for token in found.tokens if token < 768 or token >= 784]
    assert found.text == engine.processor.decode(kept, skip_special_tokens=False, clean_up_tokenization_spaces=False)


@pytest.mark.slow
def test_200_prompts_through_8_slots_give_what_each_gives_alone(engine):
    rng = np.random.default_rng(11)
    requests = random_requests(engine.model, 200, seed=10)
    ends = rng.integers(0, 768, 8).tolist()
    options = [dict(max_new_tokens=int(rng.integers(1, 50))) for _ in requests]
    many = {
        found.index: found
        for found in engine.generate_many(
            [Request(*pair) for pair in zip(requests, options, strict=True)], do_sample=False, eos_token_id=ends
        )
    }
    assert sorted(many) == list(range(200))
    reasons = set()
    for index, (inputs, option) in enumerate(zip(requests, options, strict=True)):
        alone = engine.generate(inputs, do_sample=False, eos_token_id=ends, **option)
        assert many[index].tokens == alone.tokens, f"prompt {index}"
        assert many[index].text == alone.text and many[index].prompt_tokens == inputs["input_ids"].shape[1]
        reasons.add(alone.finish_reason)
    assert reasons == {"stop", "length"}


@pytest.mark.slow
def test_draws_do_not_depend_on_slots(engine):
    requests = random_requests(engine.model, 20, seed=12)
    options = dict(max_new_tokens=12, do_sample=True, temperature=2.0, top_k=0, top_p=0.95, eos_token_id=-1)
    first = {found.index: found.tokens for found in engine.generate_many(requests, seed=4, **options)}
    narrow = Engine(engine.model, engine.processor, num_slots=3, capacity=256, steps_per_dispatch=5)
    assert first == {found.index: found.tokens for found in narrow.generate_many(requests, seed=4, **options)}
    assert first != {found.index: found.tokens for found in engine.generate_many(requests, seed=5, **options)}
    # A request's own seed makes it what it is alone.
    seeded = [Request(inputs, dict(seed=30 + i)) for i, inputs in enumerate(requests)]
    for found in engine.generate_many(seeded, **options):
        assert found.tokens == engine.generate(requests[found.index], seed=30 + found.index, **options).tokens
    # Equal prompts of one seed draw differently.
    same = [found.tokens for found in engine.generate_many([requests[0]] * 6, seed=4, **options)]
    assert len(set(same)) == 6


def test_a_long_prompt_in_pieces(engine, monkeypatch, their_tiny):
    """Of many pieces, the last of which would reach beyond the cache; pictures are cut in two."""
    rng = np.random.default_rng(13)
    inputs = random_request(engine.model, rng, 150, [(8, 8), (4, 10)])
    whole = engine.generate(inputs, max_new_tokens=24, **GREEDY)
    assert list(whole.tokens) == their_tokens(their_tiny, inputs, 24)
    for size in (32, 64):
        monkeypatch.setattr("glm4v_jax.generate.prefill_chunks.MAX_CHUNK", size)
        assert engine.generate(inputs, max_new_tokens=24, **GREEDY).tokens == whole.tokens
        (found,) = engine.generate_many([inputs], max_new_tokens=24, **GREEDY)
        assert found.tokens == whole.tokens


def test_1500_tokens_equal_the_references(engine, their_tiny):
    inputs = random_request(engine.model, np.random.default_rng(14), 1450, [(8, 8)])
    found = engine.generate(inputs, max_new_tokens=8, **GREEDY)
    assert list(found.tokens) == their_tokens(their_tiny, inputs, 8)


def test_logprobs_are_the_models(engine, picture):
    prompt = engine.processor.apply_chat_template(
        ask(picture, "Why?"), add_generation_prompt=True, tokenize=True, return_dict=True
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


def test_stop_strings_across_tokens(engine):
    whole = engine.generate("Tell me", max_new_tokens=40, **GREEDY)
    pieces = [engine.processor.decode([token]) for token in whole.tokens]
    # Two characters of a token and two of the next.
    at, stop = next(
        (i, stop)
        for i in range(8, 30)
        if min(len(pieces[i]), len(pieces[i + 1])) > 2
        and whole.text.count(stop := pieces[i][-2:] + pieces[i + 1][:2]) == 1
    )
    for steps in (1, 2, 5, MAX_STEPS):
        small = Engine(engine.model, engine.processor, capacity=256, steps_per_dispatch=steps)
        deltas = list(small.stream("Tell me", max_new_tokens=40, stop_strings=["never", stop], **GREEDY))
        found = deltas[-1].completion
        assert found.text == "".join(delta.text for delta in deltas) == whole.text[: whole.text.index(stop)]
        assert (found.finish_reason, found.stop_string) == ("stop", stop)
        assert found.tokens == whole.tokens[: at + 2]
    # Slots that stopped for a string go on with the next prompt.
    prompts = ["Tell me", "Hello", "Tell me"] * 5
    for other in engine.generate_many(prompts, max_new_tokens=40, stop_strings=stop, **GREEDY):
        alone = engine.generate(prompts[other.index], max_new_tokens=40, stop_strings=stop, **GREEDY)
        assert (other.text, other.tokens, other.finish_reason) == (alone.text, alone.tokens, alone.finish_reason)


def test_think_budget_closes_the_thought_and_goes_on_in_the_cache(engine, picture):
    prompt = engine.prompt(ask(picture, "How many?"))
    free = engine.generate(prompt, max_new_tokens=20, **GREEDY)
    deltas = list(engine.stream(prompt, think_budget=20, answer_budget=9, **GREEDY))
    found = deltas[-1].completion
    close = engine.processor.tokenizer.encode("</think><answer>")
    assert found.tokens[:20] == free.tokens and list(found.tokens[20:22]) == close and len(found.tokens) == 31
    # What follows is what follows that text as a prompt.
    after = engine.generate(prompt.extended(list(found.tokens[:22])), max_new_tokens=9, **GREEDY)
    assert found.tokens[22:] == after.tokens
    assert found.parsed.thought == free.text.strip() and found.answer == after.text.strip()
    assert found.text == f"{free.text}</think><answer>{after.text}" == "".join(delta.text for delta in deltas)
    assert "".join(part.text for delta in deltas for part in delta.parts if part.kind == "answer") == after.text
    # In a batch, with others that need none: the same.
    mixed = [Request(prompt, dict(think_budget=20, answer_budget=9)), Request(prompt, dict(max_new_tokens=20))] * 6
    for other in engine.generate_many(mixed, **GREEDY):
        assert other.tokens == (free if other.index % 2 else found).tokens


@pytest.mark.parametrize("stop", ["</think>", "<answer>"])
def test_a_stop_string_in_what_is_put_in(engine, stop):
    free = engine.generate("Think", max_new_tokens=9, **GREEDY)
    found = engine.generate("Think", think_budget=9, answer_budget=6, stop_strings=stop, **GREEDY)
    assert (found.finish_reason, found.stop_string, found.tokens) == ("stop", stop, free.tokens)
    assert found.text == free.text + ("" if stop == "</think>" else "</think>")


def test_an_end_within_a_thought_is_not_the_end(engine):
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


def test_a_loop_is_stopped(engine, monkeypatch):
    """A penalty below 1 makes the random model repeat itself."""
    options = dict(max_new_tokens=400, repetition_penalty=0.01, **GREEDY)
    whole = engine.generate("Again", **options)
    assert whole.finish_reason == "length" and len(set(whole.tokens[-50:])) < 4
    found = engine.generate("Again", stop_repetition=True, **options)
    assert found.finish_reason == "repetition" and 10 < len(found.tokens) < 400
    assert whole.text.startswith(found.text)
    # A thought that loops is closed, and the answer has its chance.
    found = engine.generate(
        "Again", stop_repetition=True, think_budget=300, answer_budget=4, repetition_penalty=0.01, **GREEDY
    )
    assert found.parsed.is_thought_closed and found.finish_reason == "length" and len(found.tokens) < 250


def test_closing_a_stream_stops_it(engine):
    before = engine.generate("Hello", max_new_tokens=30, **GREEDY)
    stream = engine.stream("Hello", max_new_tokens=30, **GREEDY)
    next(stream)
    stream.close()
    assert engine.generate("Hello", max_new_tokens=30, **GREEDY) == before
    many = engine.generate_many(["Hello"] * 20, max_new_tokens=30, **GREEDY)
    next(many)
    many.close()
    assert [found.tokens for found in engine.generate_many(["Hello"] * 9, max_new_tokens=30, **GREEDY)] == [
        before.tokens
    ] * 9
    # Two at a time have slots of their own.
    pair = [engine.stream(text, max_new_tokens=30, **GREEDY) for text in ("Hello", "Again")]
    texts = ["", ""]
    while any(pair):
        for i, stream in enumerate(pair):
            delta = next(stream, None) if stream else None
            texts[i] += delta.text if delta else ""
            pair[i] = stream if delta else None
    assert texts == [before.text, engine.generate("Again", max_new_tokens=30, **GREEDY).text]


def test_pictures_are_encoded_once(engine, picture):
    own = Engine(engine.model, engine.processor, capacity=256)
    prompts = [ask(picture, f"Question {i}") for i in range(12)]
    found = {one.index: one.tokens for one in own.generate_many(prompts, max_new_tokens=6, **GREEDY)}
    assert (own.pool.encoded, own.pool.reused) == (1, 11)
    for index, prompt in enumerate(prompts):
        fresh = Engine(engine.model, engine.processor, capacity=256)
        assert found[index] == fresh.generate(prompt, max_new_tokens=6, **GREEDY).tokens
    other = picture.copy()
    other[0, 0, 0] ^= 255
    own.generate(ask(other, "Question 1"), max_new_tokens=2, **GREEDY)
    assert own.pool.encoded == 2


def test_a_full_pool_forgets_and_grows(engine):
    from glm4v_jax.devices.mesh import use_mesh
    from glm4v_jax.generate.feature_pool import FeaturePool

    own = Engine(engine.model, engine.processor, capacity=256)
    with use_mesh(own.model.mesh):
        own.pool = FeaturePool(own.runtime, 128)
    requests = [
        random_request(own.model, np.random.default_rng(i), 6, [(8, 8), (4, 4)] * (1 + 11 * (i == 5))) for i in range(8)
    ]
    for inputs in requests:
        found = own.generate(inputs, max_new_tokens=5, **GREEDY)
        assert found.tokens == engine.generate(inputs, max_new_tokens=5, **GREEDY).tokens
    assert own.pool.capacity > 128


class Ready:
    """A queue of answers that never have to be waited for."""

    def __init__(self, answers):
        self.answers = list(answers)

    @property
    def is_empty(self):
        return not self.answers

    def fill(self):
        pass

    def ready(self):
        return self.answers

    def take(self, *, wait):
        return self.answers.pop(0) if self.answers else None


def test_slots_are_kept_busy(engine):
    """As busy as they can be: each answer begins at the step at which the first slot is free."""
    lengths = np.random.default_rng(15).integers(8, 64, 64).tolist()
    own = Engine(engine.model, engine.processor, capacity=256)
    prompt = own.prompt("Hi")
    slots = own.new_slots(8, own.config())
    list(run(slots, Ready(own.new_sequence(prompt, own.config(max_new_tokens=n, **GREEDY)) for n in lengths)))
    free = [0] * 8
    for n in lengths:  # the first token of each is prefill's
        heapq.heapreplace(free, free[0] + n - 1)
    assert own.stats.busy_steps == sum(lengths) - 64
    assert own.stats.slot_steps == 8 * max(free)


def test_pictures_in_turn_are_kept(engine):
    own = Engine(engine.model, engine.processor, capacity=256)
    rng = np.random.default_rng(17)
    pictures = [rng.integers(0, 256, (504, 504, 3), np.uint8) for _ in range(5)]
    list(own.generate_many([ask(pictures[i % 5], "What?") for i in range(30)], max_new_tokens=2, **GREEDY))
    assert (own.pool.encoded, own.pool.reused) == (5, 25)
    own.release()
    own.generate(ask(pictures[0], "What?"), max_new_tokens=2, **GREEDY)
    assert own.pool.encoded == 6


def test_an_interrupted_encoder_leaves_the_engine_whole(engine, monkeypatch, picture):
    own = Engine(engine.model, engine.processor, capacity=256)
    expected = own.generate(ask(picture, "What?"), max_new_tokens=4, **GREEDY).tokens
    other = picture[::-1].copy()
    store = device_steps.store_features

    def interrupted(*args):
        store(*args)  # gives the pool away
        raise KeyboardInterrupt

    monkeypatch.setattr(device_steps, "store_features", interrupted)
    with pytest.raises(KeyboardInterrupt):
        own.generate(ask(other, "What?"), max_new_tokens=4, **GREEDY)
    monkeypatch.undo()
    assert own.generate(ask(picture, "What?"), max_new_tokens=4, **GREEDY).tokens == expected
    assert own.generate("Hello", max_new_tokens=4, **GREEDY).tokens


def test_threads_may_share_an_engine(engine):
    own = Engine(engine.model, engine.processor, capacity=256)
    rng = np.random.default_rng(18)
    prompts = [ask(rng.integers(0, 256, (56, 84, 3), np.uint8), f"Question {i}") for i in range(12)]
    with concurrent.futures.ThreadPoolExecutor(4) as threads:
        found = list(threads.map(lambda prompt: own.generate(prompt, max_new_tokens=8, **GREEDY).tokens, prompts))
    assert found == [engine.generate(prompt, max_new_tokens=8, **GREEDY).tokens for prompt in prompts]


def test_a_long_prompt_does_not_burden_the_next(engine):
    own = Engine(engine.model, engine.processor, capacity=256)
    own.generate(random_request(own.model, np.random.default_rng(19), 400), max_new_tokens=3, **GREEDY)
    assert not own._free[1, None]
    for n in (1, 3, 5):
        own.generate("Hello", max_new_tokens=3, logprobs=n, **GREEDY)
    assert {key: len(free) for key, free in own._free.items()} == {(1, None): 0, (1, 5): 1}


def test_closing_right_after_an_answer_that_stopped_early(engine):
    """The row of an answer that met its stop string is stopped although nobody asked for the next update."""
    whole = engine.generate("Tell me", max_new_tokens=40, **GREEDY)
    own = Engine(engine.model, engine.processor, num_slots=4, capacity=256)
    many = own.generate_many(["Tell me"] * 4, max_new_tokens=40, stop_strings=whole.text[9:12], **GREEDY)
    next(many)
    many.close()
    (slots,) = own._free[4, None]
    assert np.asarray(slots._state.row.done).all()


def test_prompts_that_cannot_be_prepared(engine, tmp_path):
    prompts = ["Hello", ask(str(tmp_path / "none.png"), "What?"), "Again", [{"role": "user", "content": 3}]]
    with pytest.raises(MediaError, match=r"none\.png"):
        list(engine.generate_many(prompts, max_new_tokens=3, **GREEDY))
    found = {one.index: one for one in engine.generate_many(prompts, skip_errors=True, max_new_tokens=3, **GREEDY)}
    assert [found[i].finish_reason for i in range(4)] == ["length", "error", "length", "error"]
    assert "none.png" in found[1].error and found[1].tokens == ()
    assert found[2].tokens == engine.generate("Again", max_new_tokens=3, **GREEDY).tokens
    assert list(engine.generate_many([])) == []

    # What is wrong is told as soon as it is known, not when an answer happens to end.
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
        (dict(max_new_tokens=70_000), "max_new_tokens: found 70000"),
        (dict(think_budget=60_000, answer_budget=10_000), "think_budget: found 60,000"),
        (dict(answer_budget=5), "answer_budget: found 5; expected think_budget beside it"),
        (dict(stop_strings=[""]), "stop_strings"),
        (dict(logprobs=65), "logprobs: found 65"),
    ],
)
def test_impossible_options_are_refused_before_anything_is_computed(engine, options, message):
    with pytest.raises(GenerationError, match=message):
        engine.stream("Hello", **options)


def test_impossible_prompts_are_refused(engine, picture):
    with pytest.raises(MessageError, match="found 2 prompts"):
        engine.generate({"input_ids": np.ones((2, 3), np.int64)})
    with pytest.raises(MessageError, match="token 5000"):
        engine.generate({"input_ids": np.array([[5000]])})
    with pytest.raises(GenerationError, match="num_slots: found 0"):
        Engine(engine.model, engine.processor, num_slots=0)
    with pytest.raises(GenerationError, match=r"stop_strings: .* use glm4v_jax\.Engine"):
        engine.model.generate(input_ids=np.array([[1, 2]]), stop_strings=["a"])


def test_boxes_are_pixels_of_the_original_picture(engine, picture):
    found = engine.generate(ask(picture, "Where?"), max_new_tokens=2, **GREEDY)
    assert found.image_sizes == ((100, 70),)
    made = Completion(
        0, "<answer><|begin_of_box|>[[100, 200, 500, 1000]]<|end_of_box|>", (), 0, "stop", image_sizes=((100, 70),)
    )
    assert made.boxes == [(100, 200, 500, 1000)] and made.pixel_boxes() == [(10, 14, 50, 70)]


@pytest.mark.slow
def test_warm_engines_compile_nothing(engine, lowerings, picture):
    own = Engine(engine.model, engine.processor, num_slots=8)
    told = []
    done = own.warmup(prompt_lengths=(1, 128), vision_patches=(4, 256), max_new_tokens=40, progress=told.append)
    assert told == done and {line.program for line in done} == {"encode", "prefill", "decode"}
    with lowerings() as lowered:
        list(own.generate_many([*random_requests(own.model, 12, seed=16), "Hello"], max_new_tokens=40, **GREEDY))
        own.generate(ask(picture, "What?"), max_new_tokens=9, do_sample=True, seed=3)
        talk = own.conversation(max_new_tokens=4, do_sample=True)
        talk.send("Look", images=[picture])
        talk.send("And?")
    assert lowered == []


def test_closing_after_an_error_stops_what_is_going(engine):
    found = engine.generate_many(["Hello", ask("nowhere.png", "What?"), "Again"], skip_errors=True, **GREEDY)
    first = next(found)
    found.close()
    assert "nowhere.png" in first.error
    (again,) = engine.generate_many(["Hello"], max_new_tokens=6, **GREEDY)
    assert again.tokens == engine.generate("Hello", max_new_tokens=6, **GREEDY).tokens


class Late(Ready):
    """A queue whose prompts are never ready in time."""

    def take(self, *, wait):
        return super().take(wait=wait) if wait else None


def test_a_free_slot_is_looked_after_while_its_prompt_is_prepared(engine, monkeypatch):
    """Eight begin together, and the others wait for one another only while nothing else is to do."""
    own = Engine(engine.model, engine.processor, capacity=256)
    limits, decode = [], Slots.decode
    monkeypatch.setattr(
        Slots, "decode", lambda slots, limit, **options: limits.append(limit) or decode(slots, limit, **options)
    )
    lengths = [4] + [30] * 8
    prompt = own.prompt("Hi")
    updates = run(
        own.new_slots(8, own.config()),
        Late(own.new_sequence(prompt, own.config(max_new_tokens=n, **GREEDY)) for n in lengths),
    )
    assert sum(update.delta.completion is not None for update in updates) == 9
    # The first is done after three steps; a slot is free from then on, and others are asked for soon and again.
    assert limits[0] == MAX_STEPS and limits[1] == limits[2] == 4 and limits[-1] == MAX_STEPS


def test_processes_agree_on_prompts_ahead_of_their_turn(engine):
    answers = [engine.new_sequence(engine.prompt("Hi"), engine.config(), index=i) for i in range(5)]
    failure = Failure(9, GenerationError("broken"))
    agreed = SharedQueue(Ready([*answers[:3], failure, *answers[3:]]), 2)
    assert agreed.ready() == [] and not agreed.is_empty
    assert agreed.take(wait=False) is answers[0] and agreed.ready() == answers[1:3]
    assert agreed.take(wait=False) is answers[1] and agreed.ready() == [answers[2]]
    assert agreed.take(wait=False) is answers[2] and agreed.ready() == [answers[3]]
    told = agreed.take(wait=False)
    assert told.number == 9 and "broken" in str(told.error)
    assert [agreed.take(wait=False) for _ in range(3)] == [*answers[3:], None]
    assert agreed.is_empty
