"""Turns of a conversation: options, figures, and answers that Ctrl-C stops."""

import signal

import pytest

from glm4v_jax.cli.chat.commands import handle
from glm4v_jax.console.answer_writer import AnswerWriter
from glm4v_jax.errors import GenerationError
from glm4v_jax.generate.slots import Slots

pytestmark = pytest.mark.slow


def run(session, *lines):
    for line in lines:
        handle(session, line)


def texts(session):
    return [turn.completion.text for turn in session.turns]


def user(content):
    return {"role": "user", "content": content}


def assistant(content):
    return {"role": "assistant", "content": content}


class Interrupting(AnswerWriter):
    """Presses Ctrl-C as soon as more than some tokens are shown."""

    def __init__(self, tokens, times=1):
        super().__init__()
        self.shown = []
        self._tokens, self._times = tokens, times

    def show(self, delta):
        super().show(delta)
        self.shown.append(delta)
        if sum(len(delta.tokens) for delta in self.shown) > self._tokens:
            for _ in range(self._times):
                signal.raise_signal(signal.SIGINT)


def test_the_length_of_a_preset_holds(new_session):
    """That of `cli` is 8,192; stopped as soon as there are more tokens than the default."""
    session = new_session("cli", default=40, writer=lambda: Interrupting(tokens=40))
    run(session, "Hello")
    (turn,) = session.turns
    assert turn.completion.finish_reason == "cancelled" and len(turn.completion.tokens) > 40


def test_a_failed_message_changes_nothing_and_can_be_retried(session):
    run(session, "Hello", "/set max_new_tokens 65536")
    before = texts(session)
    with pytest.raises(GenerationError, match="max_position_embeddings"):
        run(session, "More?")
    assert texts(session) == before
    run(session, "/set max_new_tokens 8", "/retry")
    assert [turn.text for turn in session.turns] == ["Hello", "More?"]


def test_turns_do_not_share_their_random_numbers(new_session, engine):
    session = new_session("rollouts", temperature=50.0, seed=2**32 - 1)
    run(session, "Hello", "Hello")
    # So hot that the text before has no weight: equal random numbers would give equal tokens.
    assert texts(session)[0] != texts(session)[1]
    same = [engine.generate("Hello", temperature=50.0, seed=7, preset="rollouts", max_new_tokens=8) for _ in range(2)]
    assert same[0].tokens == same[1].tokens


def test_closing_a_thought_does_not_count_as_reuse_of_the_cache(session):
    run(session, "/set think_budget 3", "/set answer_budget 3", "Hello")
    assert "</think>" in session.turns[0].completion.text
    assert session.turns[0].reused == 0


def test_a_stopped_answer_stays_in_the_conversation(new_session, engine, capfd):
    writers = []

    def writer():
        writers.append(Interrupting(tokens=1 if not writers else 1000))
        return writers[-1]

    session = new_session(do_sample=False, max_new_tokens=500, writer=writer)
    run(session, "What is this?")
    (turn,) = session.turns
    assert turn.completion.finish_reason == "cancelled"
    assert turn.completion.text == "".join(delta.text for delta in writers[0].shown)
    assert "stopped by you" in capfd.readouterr().err
    run(session, "/set max_new_tokens 8", "And?")
    messages = [user("What is this?"), assistant(turn.completion.text), user("And?")]
    assert texts(session)[-1] == engine.generate(messages, do_sample=False, max_new_tokens=8).text


def test_a_second_interrupt_does_not_wait_and_keeps_the_part_that_there_is(new_session):
    session = new_session(do_sample=False, max_new_tokens=500, writer=lambda: Interrupting(tokens=0, times=2))
    with pytest.raises(KeyboardInterrupt):
        run(session, "What is this?")
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    (turn,) = session.turns
    assert turn.completion.finish_reason == "cancelled"


def test_a_second_interrupt_before_the_first_token_leaves_the_conversation_as_it_was(
    session, engine, monkeypatch, image
):
    run(session, "Hello", f"/image {image}")
    choose_first = Slots.choose_first

    def interrupted(*arguments, **options):
        chosen = choose_first(*arguments, **options)
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)
        return chosen

    with monkeypatch.context() as patch:
        patch.setattr(Slots, "choose_first", interrupted)
        with pytest.raises(KeyboardInterrupt):
            run(session, "What is this?")
    assert [turn.text for turn in session.turns] == ["Hello"]
    run(session, "/retry", "And?")
    assert [len(turn.attachments) for turn in session.turns] == [0, 1, 0]
    first, second, third = texts(session)
    shown = user([{"type": "image", "path": image}, {"type": "text", "text": "What is this?"}])
    messages = [user("Hello"), assistant(first), shown, assistant(second), user("And?")]
    assert third == engine.generate(messages, do_sample=False, max_new_tokens=8).text
