"""The scheduler: slots are kept busy, and processes agree on prompts."""

import heapq

import numpy as np
from helpers_generation import GREEDY

from glm4v_jax.errors import GenerationError
from glm4v_jax.generate.scheduler import Failure, SharedQueue, run
from glm4v_jax.generate.slots import MAX_STEPS, Slots


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
