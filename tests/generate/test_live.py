"""Requests that come at any time: each gets what it gets alone, and what fails hurts nobody else."""

import concurrent.futures
import contextlib

import numpy as np
import pytest
from helpers_generation import GREEDY, ask, random_requests

from glm4v_jax.errors import GenerationError, MediaError
from glm4v_jax.generate import live
from glm4v_jax.generate.feature_pool import FeaturePool
from glm4v_jax.generate.live import MAX_RESTARTS, LiveEngine, QueueFullError
from glm4v_jax.generate.scheduler import Failure
from glm4v_jax.generate.slots import Slots

pytestmark = pytest.mark.slow

TIMEOUT = 120


class Caller:
    """Submits requests and waits for them."""

    def __init__(self, live, engine, receive=None):
        self.live, self.engine = live, engine
        self._receive = receive or (lambda sequence, update: None)

    def send(self, *prompts, **options):
        """A request of a sequence for each prompt; returns it, and for each sequence the updates' text and a future."""
        engine, futures = self.engine, {}
        for number, prompt in enumerate(prompts):
            sequence = engine.new_sequence(engine.prompt(prompt), engine.config(**GREEDY | options), number=number)
            futures[sequence] = [], concurrent.futures.Future()

        def receive(sequence, update):
            text, future = futures[sequence]
            if isinstance(update, Failure):
                future.set_exception(update.error)
                return
            text.append(update.delta.text)
            if update.delta.completion is not None:
                future.set_result(update.delta.completion)
            self._receive(sequence, update)

        return self.live.submit(list(futures), receive), list(futures.values())

    def answer(self, prompt, **options):
        """The completion of one request."""
        _, [(text, future)] = self.send(prompt, **options)
        completion = future.result(TIMEOUT)
        assert "".join(text) == completion.text
        return completion


@pytest.fixture
def start(make_engine):
    """Start a live engine of eight slots; returns its caller."""
    with contextlib.ExitStack() as stack:

        def made(receive=None, started=True, **options):
            live = LiveEngine(make_engine(), **options)
            stack.callback(live.close)
            if started:
                live.start()
            return Caller(live, live._engine, receive)

        yield made


def test_requests_get_what_each_gets_alone(engine, start):
    """Twelve with options of their own, six at a time."""
    caller, rng = start(), np.random.default_rng(21)
    requests = random_requests(engine.model, 12, seed=20)
    options = [dict(max_new_tokens=int(rng.integers(1, 30)), do_sample=i % 2 == 0, seed=i) for i in range(12)]
    with concurrent.futures.ThreadPoolExecutor(6) as clients:
        found = list(clients.map(lambda pair: caller.answer(pair[0], **pair[1]), zip(requests, options, strict=True)))
    for request, option, completion in zip(requests, options, found, strict=True):
        assert completion == engine.generate(request, **GREEDY | option)
    assert (caller.live.num_running, caller.live.num_waiting, caller.live.restarts) == (0, 0, 0)


def test_one_request_alone_is_answered(engine, start):
    caller = start()
    for _ in range(2):
        assert caller.answer("Hi", max_new_tokens=3) == engine.generate("Hi", max_new_tokens=3, **GREEDY)
    assert caller.live.state == "ready"


def test_updates_are_delivered_while_the_device_has_its_next_work(start, monkeypatch):
    """What receivers do, and the threads that they wake, never come between two dispatches of a running row."""
    calls = []
    caller = start(lambda sequence, update: calls.append("ended" if update.delta.completion else "receive"))
    for name in ("decode", "read"):
        own = getattr(Slots, name)
        monkeypatch.setattr(
            Slots, name, lambda *args, own=own, name=name, **more: calls.append(name) or own(*args, **more)
        )
    caller.answer("Tell me", max_new_tokens=150)
    assert calls.count("receive") > 2
    assert all(calls[i - 1] == "decode" for i, call in enumerate(calls) if call == "receive"), calls
    assert calls[-2:] == ["read", "ended"]  # nothing else is to run


def test_sequences_of_a_request_differ_by_their_number(start):
    caller = start()
    prompt = caller.engine.prompt("Hi")
    _, sequences = caller.send(prompt, prompt, do_sample=True, temperature=3.0, max_new_tokens=12, top_k=0)
    first, second = (future.result(TIMEOUT).tokens for _, future in sequences)
    assert first != second
    assert first == caller.answer(prompt, do_sample=True, temperature=3.0, max_new_tokens=12, top_k=0).tokens


def test_a_cancelled_sequence_ends_and_frees_its_row(start):
    sent = concurrent.futures.Future()
    caller = start(lambda sequence, update: sent.result(TIMEOUT).cancel())  # with the first tokens
    request, [(_, future)] = caller.send("Tell me", max_new_tokens=150)
    sent.set_result(request)
    completion = future.result(TIMEOUT)
    assert completion.finish_reason == "cancelled" and 0 < len(completion.tokens) < 150
    assert caller.live.num_running == 0
    caller.answer("Hi", max_new_tokens=2)
    request.cancel()  # has no effect any more


def test_what_waits_can_be_cancelled_and_the_queue_can_be_full(start):
    caller = start(started=False, max_waiting=2)
    _, eight = caller.send(*["Hi"] * 8, max_new_tokens=2)
    waiting, [(_, future)] = caller.send("Hi")
    with pytest.raises(QueueFullError, match="9 requests running or waiting, and 2 more; expected at most 10"):
        caller.send("Hi", "Hi")
    assert (caller.live.state, caller.live.num_waiting) == ("starting", 9)
    waiting.cancel()
    assert caller.live.num_waiting == 8
    caller.live.start()
    assert future.result(TIMEOUT).finish_reason == "cancelled" and future.result().tokens == ()
    assert all(future.result(TIMEOUT).finish_reason == "length" for _, future in eight)


def fail(*args, **options):
    raise RuntimeError("the device is gone")


def test_what_waits_may_hold_only_so_much_memory(start, monkeypatch, image):
    monkeypatch.setattr(live, "MAX_MEDIA_BYTES", 0)
    caller = start(started=False)
    shown = caller.engine.prompt(ask(image, "What?"))
    caller.send(shown, shown, max_new_tokens=1)  # a request alone may have more
    caller.send("Hi")
    with pytest.raises(QueueFullError, match=r"GiB of images and videos; .* send it again later"):
        caller.send(shown)


def test_an_error_in_the_slots_fails_what_is_running_and_nothing_else(start, monkeypatch):
    caller = start(started=False)
    with monkeypatch.context() as patch:
        patch.setattr(Slots, "decode", lambda *args, **options: (patch.undo(), fail()))
        _, sequences = caller.send(*["Hi"] * 10, max_new_tokens=2)
        caller.live.start()
        for _, future in sequences[:8]:
            with pytest.raises(GenerationError, match=r"found an error in its slots \(RuntimeError\).* send .* again"):
                future.result(TIMEOUT)
        assert all(future.result(TIMEOUT).finish_reason == "length" for _, future in sequences[8:])
    assert (caller.live.state, caller.live.restarts) == ("ready", 1)


def test_what_has_ended_before_an_error_is_delivered(start, monkeypatch):
    decode, calls = Slots.decode, []

    def second_fails(*args, **options):
        calls.append(1)
        return fail() if len(calls) == 2 else decode(*args, **options)

    caller = start(started=False)
    (_, [(_, short)]), (_, [(_, long)]) = (caller.send("Hi", max_new_tokens=n) for n in (1, 200))
    monkeypatch.setattr(Slots, "decode", second_fails)
    caller.live.start()
    assert short.result(TIMEOUT).finish_reason == "length"
    assert isinstance(long.exception(TIMEOUT), GenerationError)


def test_an_engine_that_fails_again_and_again_gives_up(start, monkeypatch):
    monkeypatch.setattr(Slots, "advance", fail)
    caller = start(started=False)
    _, sequences = caller.send(*["Hi"] * (8 * (MAX_RESTARTS + 1) + 1))
    caller.live.start()
    assert all(isinstance(future.exception(TIMEOUT), GenerationError) for _, future in sequences)
    caller.live._thread.join(TIMEOUT)
    assert (caller.live.state, caller.live.restarts) == ("failed", MAX_RESTARTS + 1)
    with pytest.raises(GenerationError, match="found it failed; expected it ready"):
        caller.send("Hi")


def test_an_image_that_cannot_be_encoded_fails_alone(engine, start, monkeypatch, image):
    caller = start(started=False)
    bad, store = caller.engine.prompt(ask(image[:, ::-1], "What?")), FeaturePool._store
    keys = {medium.key for medium in bad.media}
    monkeypatch.setattr(
        FeaturePool,
        "_store",
        lambda pool, wave, begins: fail() if keys & {m.key for m in wave.media} else store(pool, wave, begins),
    )
    _, sequences = caller.send(ask(image, "What?"), bad, ask(image, "Why?"), "Hi", max_new_tokens=3)
    caller.live.start()
    with pytest.raises(MediaError, match=r"cannot be encoded \(RuntimeError\)"):
        sequences.pop(1)[1].result(TIMEOUT)
    assert [future.result(TIMEOUT) for _, future in sequences] == [
        engine.generate(prompt, max_new_tokens=3, **GREEDY)
        for prompt in (ask(image, "What?"), ask(image, "Why?"), "Hi")
    ]
    assert caller.live.restarts == 0


def test_a_receiver_that_fails_is_cancelled_and_harms_nobody(engine, start):
    caller = start()
    calls = []

    def broken(sequence, update):
        calls.append(update)
        fail()

    sequence = caller.engine.new_sequence(
        caller.engine.prompt("Hi"), caller.engine.config(max_new_tokens=100, **GREEDY)
    )
    caller.live.submit([sequence], broken)
    assert caller.answer("Hi", max_new_tokens=20) == engine.generate("Hi", max_new_tokens=20, **GREEDY)
    caller.live.close(TIMEOUT)
    assert sequence.finish_reason == "cancelled" and len(calls) == 1 and caller.live.restarts == 0


@pytest.mark.parametrize(("drain_seconds", "reason"), [(TIMEOUT, "length"), (0, "cancelled")])
def test_closing_finishes_or_cancels_what_is_left(start, drain_seconds, reason):
    caller = start()
    _, sequences = caller.send(*["Hi"] * 9, max_new_tokens=100)
    caller.live.close(drain_seconds)
    assert {future.result(0).finish_reason for _, future in sequences} == {reason}
    assert caller.live.state == "closed"
    with pytest.raises(GenerationError, match="found it closed"):
        caller.send("Hi")


def test_closing_before_the_start_cancels(start):
    caller = start(started=False)
    _, [(_, future)] = caller.send("Hi")
    caller.live.close()
    assert future.result(0).finish_reason == "cancelled"


def test_a_request_must_fit_the_slots(start):
    caller = start(started=False, capacity=100, logprobs=5)
    for options, message in [
        (dict(logprobs=6), "logprobs: found 6; expected at most 5"),
        (dict(prompt_lookup_num_tokens=3), "prompt_lookup_num_tokens: found 3; expected None"),
        (dict(max_new_tokens=100), "max_new_tokens: found 100 after a prompt of"),
        (dict(eos_token_id=list(range(20))), "eos_token_id: found 20 end tokens; expected at most 16"),
    ]:
        with pytest.raises(GenerationError, match=message):
            caller.send("Hi", **options)
    caller.send("Hi", logprobs=2, max_new_tokens=20)
    assert caller.live.num_waiting == 1


def test_log_probabilities_are_given_to_those_that_ask(engine, start):
    caller = start(logprobs=5)
    with_some, without = caller.answer("Hi", logprobs=3, max_new_tokens=3), caller.answer("Hi", max_new_tokens=3)
    assert with_some.tokens == without.tokens and without.logprobs is None
    assert [len(token.top) for token in with_some.logprobs] == [3, 3, 3]


def test_log_probabilities_are_computed_where_one_asks(start, monkeypatch):
    decode, tops = Slots.decode, []

    def note(slots, *arguments, **options):
        tops.append(slots.variant.top)
        return decode(slots, *arguments, **options)

    monkeypatch.setattr(Slots, "decode", note)
    caller = start(logprobs=5)
    for logprobs, top in ((None, None), (0, 5), (None, None)):
        caller.answer("Hi", logprobs=logprobs, max_new_tokens=3)
        assert set(tops) == {top}
        tops.clear()
