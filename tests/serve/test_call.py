"""One request between the engine's thread and the event loop, with updates made by hand."""

import asyncio
import dataclasses
import threading

import pytest
from helpers_checkpoints import RANDOM_CHECKPOINT

from glm4v_jax.config.generation import GenerationConfig
from glm4v_jax.errors import GenerationError, MediaError
from glm4v_jax.generate.completion import Delta
from glm4v_jax.generate.scheduler import Failure, Update
from glm4v_jax.generate.sequence import SequenceState
from glm4v_jax.inputs.prompt import Prompt
from glm4v_jax.inputs.text.tokenizer import Glm4vTokenizer
from glm4v_jax.serve import call as module
from glm4v_jax.serve.call import Call, Inbox
from glm4v_jax.serve.errors import ApiError
from glm4v_jax.serve.metrics import Metrics
from glm4v_jax.serve.requests import ApiRequest
from glm4v_jax.serve.responses import Reply


@pytest.fixture(scope="module")
def tokenizer():
    return Glm4vTokenizer.from_pretrained(RANDOM_CHECKPOINT)


class FakeEngine:
    """Takes requests as `LiveEngine` does, and sends what it is told to."""

    def __init__(self):
        self.is_cancelled = False

    def submit(self, sequences, receive):
        self.sequences, self._receive = sequences, receive
        return self

    def cancel(self):
        self.is_cancelled = True

    def send(self, *updates):
        """Send updates from a thread of its own: (number, update)."""

        def work():
            for number, update in updates:
                self._receive(self.sequences[number], update)

        thread = threading.Thread(target=work)
        thread.start()
        thread.join()


def run(tokenizer, check, *, count=1, **fields):
    """Runs a coroutine function of a call and its engine."""

    async def body():
        prompt = Prompt.of_text([5, 6])
        sequences = [SequenceState(prompt, GenerationConfig(), tokenizer, 100, index=i) for i in range(count)]
        reply = Reply(ApiRequest((), True, {}, n=count, **fields), [prompt], "tiny", tokenizer)
        call, engine = Call(reply, sequences, Metrics("tiny"), 0.0, Inbox()), FakeEngine()
        call.submit(engine)
        return await check(call, engine)

    return asyncio.run(body())


def ended(sequence, **fields):
    completion = dataclasses.replace(sequence.completion(), **fields)
    return Update(sequence, Delta("", (), (), completion))


def test_completions_come_in_the_order_of_their_choices(tokenizer):
    async def check(call, engine):
        first, second = engine.sequences
        engine.send((1, ended(second, finish_reason="length")), (0, ended(first, finish_reason="stop")))
        return [completion.finish_reason for completion in await call.completions()]

    assert run(tokenizer, check, count=2) == ["stop", "length"]


@pytest.mark.parametrize(
    ("error", "status"),
    [(GenerationError("engine: found an error"), 500), (MediaError("image 0: found none"), 400), (OSError("x"), 500)],
)
def test_an_error_ends_all_choices(tokenizer, error, status):
    async def check(call, engine):
        engine.send((0, Failure(0, error)))
        with pytest.raises(ApiError) as raised:
            await call.completions()
        assert engine.is_cancelled and raised.value.status == status

    run(tokenizer, check, count=2)


def test_a_grammar_that_cannot_be_followed_is_the_clients_error(tokenizer):
    async def check(call, engine):
        engine.send((0, ended(engine.sequences[0], finish_reason="error", error="grammar: found none")))
        with pytest.raises(ApiError, match="grammar: found none") as raised:
            await call.completions()
        assert raised.value.status == 400

    run(tokenizer, check)


@pytest.mark.parametrize("is_stream", [True, False])
def test_what_the_server_cancels_never_seems_whole(tokenizer, is_stream):
    async def check(call, engine):
        sequence, found = engine.sequences[0], []
        engine.send((0, Update(sequence, Delta("a", (), (5,)))), (0, ended(sequence, finish_reason="cancelled")))
        with pytest.raises(ApiError, match="ending") as raised:
            if not is_stream:
                await call.completions()
            async for news in call.deltas():
                found += [delta.text for _, delta in news]
        assert raised.value.status == 503 and found == ["a"] * is_stream

    run(tokenizer, check, is_stream=is_stream)


def test_who_waits_no_more_cancels(tokenizer):
    async def check(call, engine):
        waiting = asyncio.create_task(call.completions())
        await asyncio.sleep(0)
        waiting.cancel()
        await asyncio.gather(waiting, return_exceptions=True)
        assert engine.is_cancelled

    run(tokenizer, check)


def test_a_reader_that_is_too_slow_is_cancelled(tokenizer, monkeypatch):
    monkeypatch.setattr(module, "MAX_UNREAD", 3)

    async def check(call, engine):
        delta = Delta("a", (), (5,))
        engine.send(*[(0, Update(engine.sequences[0], delta))] * 4)
        with pytest.raises(ApiError, match="too slow"):
            async for _ in call.deltas():
                pass
        assert engine.is_cancelled

    run(tokenizer, check, is_stream=True)


def test_deltas_come_in_their_order(tokenizer):
    async def check(call, engine):
        sequence = engine.sequences[0]
        updates = [(0, Update(sequence, Delta(text, (), (5,)))) for text in "abc"]
        engine.send(*updates, (0, ended(sequence, finish_reason="stop")))
        found = [(number, delta.text) async for news in call.deltas() for number, delta in news]
        assert found == [(0, "a"), (0, "b"), (0, "c"), (0, "")] and not engine.is_cancelled

    run(tokenizer, check, is_stream=True)


def test_the_loop_is_woken_once_for_what_comes_together(tokenizer, monkeypatch):
    async def check(call, engine):
        loop, woken = asyncio.get_running_loop(), []
        wake = loop.call_soon_threadsafe
        monkeypatch.setattr(loop, "call_soon_threadsafe", lambda *work: woken.append(work) or wake(*work))
        updates = [(0, Update(engine.sequences[0], Delta(text, (), (5,)))) for text in "abc"]
        deltas = call.deltas()
        for _ in range(2):
            engine.send(*updates)
            assert [delta.text for _, delta in await anext(deltas)] == ["a", "b", "c"]
        return len(woken)

    assert run(tokenizer, check, is_stream=True) == 2


def test_an_error_in_one_call_does_not_keep_the_others():
    async def body():
        taken, errors = [], []
        asyncio.get_running_loop().set_exception_handler(lambda loop, context: errors.append(context["exception"]))
        inbox = Inbox()
        for work in (lambda: taken.append(1), lambda: 1 / 0, lambda: taken.append(2)):
            inbox.put(work)
        await asyncio.sleep(0.01)
        inbox.put(lambda: taken.append(3))
        await asyncio.sleep(0.01)
        return taken, errors

    taken, [error] = asyncio.run(body())
    assert taken == [1, 2, 3] and isinstance(error, ZeroDivisionError)
