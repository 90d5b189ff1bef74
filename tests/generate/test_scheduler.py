"""The scheduler: slots are kept busy, and processes agree on prompts."""

import heapq

import numpy as np
import pytest
from helpers_generation import GREEDY, Ready, random_request

from glm4v_jax.errors import GenerationError
from glm4v_jax.generate import device_steps
from glm4v_jax.generate.prefill_chunks import MIN_LIVE_CHUNK
from glm4v_jax.generate.scheduler import DispatchSize, Failure, SharedQueue, run
from glm4v_jax.generate.slots import MAX_STEPS, Slots


class Late(Ready):
    """A queue whose prompts are never ready in time."""

    def take(self, *, wait):
        return super().take(wait=wait) if wait else None


def test_slots_are_kept_busy(engine, make_engine):
    """As busy as they can be: each answer begins at the step at which the first slot is free."""
    lengths = np.random.default_rng(15).integers(8, 64, 64).tolist()
    own = make_engine()
    prompt = own.prompt("Hi")
    slots = own.new_slots(8, own.config())
    list(run(slots, Ready(own.new_sequence(prompt, own.config(max_new_tokens=n, **GREEDY)) for n in lengths)))
    free = [0] * 8
    for n in lengths:  # the first token of each is prefill's
        heapq.heapreplace(free, free[0] + n - 1)
    assert own.stats.busy_steps == sum(lengths) - 64
    assert own.stats.slot_steps == 8 * max(free)


def test_dispatches_are_short_while_a_prompt_for_a_free_slot_is_prepared(engine, monkeypatch, make_engine):
    """Eight begin together, and the others wait for one another only while nothing else is to do."""
    own = make_engine()
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


class Joining(Ready):
    """A queue of the first answer, and of the others once that runs."""

    joined = False

    @property
    def is_empty(self):
        return not self.ready()

    def ready(self):
        return self.answers if self.joined or self.answers[:1] == [self.first] else []

    def take(self, *, wait):
        return self.answers.pop(0) if self.ready() else None

    def __init__(self, answers):
        super().__init__(answers)
        self.first = self.answers[0]


@pytest.fixture
def join(make_engine, monkeypatch):
    """Run prompts through eight slots, in chunks of 32 tokens, one chunk and two decode steps in turns.

    Takes prompts with their options; the class of the queue; what to do before each chunk, with the sequences; and
    another length of chunks.
    Returns these, and what was dispatched: the row of each chunk, or "decode".
    """

    def ran(prompts, queue=Joining, between=lambda slots, sequences: None, chunk=32):
        own, log = make_engine(), []
        advance, decode = Slots.advance, Slots.decode

        def logged_advance(slots, upcoming):
            between(slots, sequences)
            log.append(next(iter(slots.prefilling)))
            return advance(slots, upcoming)

        monkeypatch.setattr("glm4v_jax.generate.scheduler.STREAM_PERIOD", 0)
        monkeypatch.setattr(Slots, "advance", logged_advance)
        monkeypatch.setattr(Slots, "decode", lambda *args, **idle: log.append("decode") or decode(*args, **idle))
        sequences = [
            own.new_sequence(own.prompt(prompt), own.config(**GREEDY | options), index=index)
            for index, (prompt, options) in enumerate(prompts)
        ]
        slots, waiting = own.new_slots(8, own.config()), queue(sequences)
        slots.use_chunks(chunk)
        for _ in run(slots, waiting, steps=2, interleave=True):
            waiting.joined = True
        assert not slots.prefilling
        return sequences, log

    return ran


def equal_alone(engine, sequences, prompts):
    """Whether sequences got the tokens that the engine gives for their prompts one by one."""
    return [sequence.tokens for sequence in sequences] == [
        list(engine.generate(prompt, **GREEDY | options).tokens) for prompt, options in prompts
    ]


def test_long_prompts_join_chunk_by_chunk(engine, join):
    """One goes between two dispatches of what runs, the restart of a thought whose budget is used up before others."""
    rng = np.random.default_rng(30)
    media = [(8, 8), (4, 10), (6, 8)]
    prompts = [
        ("Hi", dict(max_new_tokens=60)),
        (random_request(engine.model, rng, 80, media), dict(think_budget=4, answer_budget=8)),
        (random_request(engine.model, rng, 80, media), dict(max_new_tokens=9)),
    ]
    assert all(128 < inputs["input_ids"].size <= 160 for inputs, _ in prompts[1:])
    # Features of other requests take the place of these between the chunks of an image.
    sequences, log = join(prompts, between=lambda slots, _: slots.pool.forget())
    assert log[:12] == [0, "decode", *[1, "decode"] * 5]
    # The second prompt's chunks, and among them what closes the first's thought.
    joining = log[12 : 12 + 12]
    assert joining[1::2] == ["decode"] * 6 and sorted(joining[::2]) == [1, *[2] * 5] and joining[-2] == 2
    assert equal_alone(engine, sequences, prompts)


def test_prompts_that_start_together_take_turns_once_one_is_complete(engine, join):
    rng = np.random.default_rng(31)
    prompts = [(random_request(engine.model, rng, 90), dict(max_new_tokens=20)) for _ in range(2)]
    sequences, log = join(prompts, Ready)
    assert log[:12] == [*[0, "decode"] * 3, *[1, "decode"] * 3]
    assert equal_alone(engine, sequences, prompts)


def test_the_shortest_chunks_are_not_padded(engine, join, monkeypatch):
    """Where a decode step takes no longer than 16 tokens, padding them to 32 would double what others wait."""
    lengths, prefill = [], device_steps.prefill
    monkeypatch.setattr(
        device_steps, "prefill", lambda *args: lengths.append(args[3].input_ids.shape[1]) or prefill(*args)
    )
    rng = np.random.default_rng(32)
    prompts = [(random_request(engine.model, rng, n), dict(max_new_tokens=30)) for n in (40, 70)]
    sequences, log = join(prompts, chunk=MIN_LIVE_CHUNK)
    counts = [sum(entry == row for entry in log) for row in (0, 1)]
    assert counts[0] == 3 and counts[1] >= 5 and lengths == [MIN_LIVE_CHUNK] * sum(counts)
    assert equal_alone(engine, sequences, prompts)


def test_a_prompt_that_is_half_in_can_be_cancelled(engine, join):
    """And what has been prefilled of it does no harm to the next in its row, nor to those that decode."""
    rng = np.random.default_rng(33)
    lengths = [60, *[5] * 9]
    prompts = [(random_request(engine.model, rng, 140), dict(max_new_tokens=n)) for n in lengths]

    def cancel(slots, sequences):
        if 1 in slots.prefilling and slots.prefilling[1].done == 64:
            sequences[1].cancel()

    sequences, _ = join(prompts, between=cancel)
    assert sequences[1].finish_reason == "cancelled" and not sequences[1].tokens
    del sequences[1], prompts[1]
    assert equal_alone(engine, sequences, prompts)


def test_processes_agree_on_prompts_ahead_of_their_turn(engine):
    answers = [engine.new_sequence(engine.prompt("Hi"), engine.config(), index=i) for i in range(5)]
    failure = Failure(9, GenerationError("broken"))
    agreed = SharedQueue(Ready([*answers[:3], failure, *answers[3:]]), 2)
    assert agreed.ready() == [] and not agreed.is_empty
    assert agreed.take(wait=False) is answers[0] and agreed.ready() == answers[1:3]
    assert agreed.take(wait=False) is answers[1] and agreed.ready() == [answers[2]]
    assert agreed.take(wait=False) is answers[2] and agreed.ready() == [answers[3]]
    reported = agreed.take(wait=False)
    assert reported.number == 9 and "broken" in str(reported.error)
    assert [agreed.take(wait=False) for _ in range(3)] == [*answers[3:], None]
    assert agreed.is_empty


def test_short_dispatches_say_nothing_of_longer_ones():
    pace = DispatchSize(None)
    for is_cut, steps in ((True, 1), (True, 1), (False, 2)):
        pace.begin()
        pace.end(is_cut=is_cut)
        assert pace.steps == steps
