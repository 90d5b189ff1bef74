"""Turns that keep their cache give what one long prompt gives, and what the reference gives for it."""

import numpy as np
import PIL.Image
import pytest
from helpers_generation import GREEDY, script, their_tokens

from glm4v_jax.errors import GenerationError, MediaError, MessageError
from glm4v_jax.generate.completion import last
from glm4v_jax.generate.prompt import prompt_of
from glm4v_jax.generate.text.thinking import without_thoughts
from glm4v_jax.inputs.media.load import SampledVideo

pytestmark = pytest.mark.slow

TEXTS = ["What is this?", "Why?", "And this one?", "Which is larger?"]


@pytest.fixture(scope="module")
def pictures():
    rng = np.random.default_rng(5)
    return [rng.integers(0, 256, (h, w, 3), np.uint8) for h, w in ((60, 140), (110, 80))]


def their_inputs_of(engine, messages):
    return engine.processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=True, return_dict=True)


def test_one_image_or_video_needs_no_list(engine, monkeypatch, tmp_path, pictures):
    asked = []
    monkeypatch.setattr(engine, "new_sequence", lambda prompt, *_, **__: asked.append(prompt))

    def shown(prompt):
        return prompt.input_ids.tolist(), [medium.key for medium in prompt.media]

    image, talk = PIL.Image.fromarray(pictures[0]), engine.conversation()
    files = [tmp_path / f"{index}.png" for index in range(4)]
    for path in files:
        image.save(path)
    images = (str(files[0]), files[0], files[0].as_uri(), files[0].read_bytes(), image, pictures[0])
    videos = (str(tmp_path), tmp_path, files, [files], [tmp_path], SampledVideo([image] * 4), SampledVideo(tmp_path, 2))
    video = {"type": "video", "video": [image] * 4, "fps": 2}
    for kind, forms, item in (("images", images, {"type": "image", "image": image}), ("videos", videos, video)):
        message = {"role": "user", "content": [item, {"type": "text", "text": "What?"}]}
        expected = shown(prompt_of([message], engine.processor, engine.runtime.config))
        for form in forms:
            talk.ask("What?", **{kind: form})
            assert shown(asked.pop()) == expected, form


@pytest.mark.slow
def test_four_turns_with_pictures_in_the_first_and_third(engine, their_tiny, pictures):
    import torch

    talk = engine.conversation("Be brief.", max_new_tokens=14, **GREEDY)
    encoded, cached = engine.pool.encoded, []
    for turn, text in enumerate(TEXTS):
        before = engine.stats.prefill_tokens
        found = talk.send(text, images=[pictures[turn // 2]] if turn in (0, 2) else [])
        inputs = their_inputs_of(engine, talk.messages[:-1])
        assert list(found.tokens) == their_tokens(their_tiny, inputs, 14), f"turn {turn}"
        alone = engine.generate(talk.messages[:-1], max_new_tokens=14, **GREEDY)
        assert found == alone and found.prompt_tokens == inputs["input_ids"].shape[1]
        run = engine.stats.prefill_tokens - before - alone.prompt_tokens
        cached.append(found.prompt_tokens - run)
        # The positions of the whole conversation, which 4.57.1 computes right where it sees it whole, as 5.x does.
        positions, deltas = their_tiny.model.get_rope_index(
            torch.tensor(inputs["input_ids"]), torch.tensor(inputs["image_grid_thw"]), None
        )
        length = found.prompt_tokens
        assert np.array_equal(talk.in_cache.position_ids[:, :length], positions[:, 0].numpy())
        assert talk.in_cache.delta == int(deltas[0, 0])
    assert engine.pool.encoded - encoded == 2
    # All that a turn shares with the one before it stayed: its prompt, and most of its answer.
    lengths = [0, *[one.prompt_tokens for one in talk.completions]]
    assert cached[0] == 0
    assert all(stayed >= length for stayed, length in zip(cached[1:], lengths[1:-1], strict=True))


def test_a_picture_seen_before_is_not_encoded_again(engine, pictures):
    talk = engine.conversation(max_new_tokens=4, **GREEDY)
    talk.send("Look", images=[pictures[0]])
    encoded = engine.pool.encoded
    talk.send("The same?", images=[pictures[0].copy()])
    assert engine.pool.encoded == encoded


def test_thoughts_are_not_kept(engine, pictures):
    talk = engine.conversation(think_budget=9, answer_budget=6, **GREEDY)
    first = talk.send("Think", images=[pictures[1]])
    assert first.parsed.thought and "</think>" in first.text
    assert talk.messages[-1] == {"role": "assistant", "content": without_thoughts(first.text)}
    assert "think" not in talk.messages[-1]["content"]
    second = talk.send("Again")
    assert second == engine.generate(talk.messages[:-1], think_budget=9, answer_budget=6, **GREEDY)
    assert second.prompt_tokens == their_inputs_of(engine, talk.messages[:-1])["input_ids"].shape[1]


def test_an_answer_that_was_stopped_stays_as_far_as_it_came(engine):
    talk = engine.conversation(max_new_tokens=60, **GREEDY)
    stream = talk.ask("Tell me everything")
    shown = "".join(next(stream).text for _ in range(3))
    stream.close()
    assert talk.completions[-1].finish_reason == "cancelled" and talk.completions[-1].text == shown
    assert talk.messages[-1]["content"] == shown
    found = talk.send("Go on", max_new_tokens=12)
    assert found == engine.generate(talk.messages[:-1], max_new_tokens=12, **GREEDY)


def test_undo(engine, pictures):
    talk = engine.conversation(max_new_tokens=6, **GREEDY)
    first = talk.send("One")
    talk.send("Two", images=[pictures[0]])
    talk.undo()
    assert len(talk.messages) == 2 and talk.completions == [first]
    third = talk.send("Three", images=[pictures[1]])
    assert third == engine.generate(talk.messages[:-1], max_new_tokens=6, **GREEDY)
    talk.undo()
    talk.undo()
    with pytest.raises(MessageError, match="undo"):
        talk.undo()


def test_what_fails_leaves_the_conversation_as_it_was(engine, tmp_path):
    talk = engine.conversation(max_new_tokens=5, **GREEDY)
    talk.send("One")
    before = list(talk.messages)
    with pytest.raises(MediaError, match=r"none\.png"):
        talk.ask("Look", images=[str(tmp_path / "none.png")])
    with pytest.raises(GenerationError, match="max_new_tokens"):
        talk.ask("Long", max_new_tokens=65_536)
    with pytest.raises(GenerationError, match="logprobs"):
        talk.ask("Why", logprobs=2)
    assert talk.messages == before
    assert talk.send("Two") == engine.generate(talk.messages[:-1], max_new_tokens=5, **GREEDY)


def test_a_conversation_outgrows_its_cache(engine):
    talk = engine.conversation(max_new_tokens=90, **GREEDY)
    for text in ("One", "Two", "Three"):
        found = talk.send(text)
    assert found.prompt_tokens > 128
    assert found == engine.generate(talk.messages[:-1], max_new_tokens=90, **GREEDY)


def test_asking_again_ends_the_answer_before(engine):
    talk = engine.conversation(max_new_tokens=40, **GREEDY)
    first = talk.ask("One")
    next(first)
    second = talk.send("Two", max_new_tokens=6)
    assert [one.finish_reason for one in talk.completions] == ["cancelled", "length"]
    assert list(first) == []
    assert second == engine.generate(talk.messages[:-1], max_new_tokens=6, **GREEDY)
    talk.undo()
    talk.undo()
    never_read, third = talk.ask("Three"), talk.ask("Four", max_new_tokens=6)
    assert last(third) == engine.generate([{"role": "user", "content": "Four"}], max_new_tokens=6, **GREEDY)
    assert list(never_read) == [] and len(talk.completions) == 1


def test_closing_while_a_thought_is_closed(engine):
    """What was put in has not been run yet: the next turn must not take it for granted."""
    talk = engine.conversation(think_budget=6, answer_budget=8, **GREEDY)
    stream = talk.ask("Think")
    while "</think>" not in next(stream).text:
        pass
    stream.close()
    assert len(talk.in_cache) == talk.completions[0].prompt_tokens + 5
    assert talk.send("Again") == engine.generate(talk.messages[:-1], think_budget=6, answer_budget=8, **GREEDY)


def test_a_preset_and_options_that_are_not_given(engine):
    talk = engine.conversation()
    stream = talk.ask("Hello", preset="cli", max_new_tokens=None, temperature=None, eos_token_id=-1)
    assert sum(len(next(stream).tokens) for _ in range(24)) > 20  # at least one each, however slow the machine is
    stream.close()
    with pytest.raises(GenerationError, match="num_return_sequences"):
        talk.ask("Hello", num_return_sequences=2, do_sample=True)


def test_the_system_may_change(engine):
    talk = engine.conversation(max_new_tokens=5, **GREEDY)
    assert talk.system is None
    talk.send("One")
    talk.system = "Be kind."
    assert talk.messages[0] == {"role": "system", "content": "Be kind."} and talk.system == "Be kind."
    assert talk.send("Two") == engine.generate(talk.messages[:-1], max_new_tokens=5, **GREEDY)
    talk.system = None
    assert [message["role"] for message in talk.messages] == ["user", "assistant"] * 2


def test_turns_draw_differently(engine):
    talk = engine.conversation(max_new_tokens=8, do_sample=True, temperature=50.0, top_k=0, eos_token_id=-1)
    assert talk.send("Hello").tokens != talk.send("Hello").tokens


def test_results_of_tools_answer_the_calls_of_a_turn(engine, monkeypatch, pictures):
    """Calls and thoughts go into the history apart, for the template; results may hold images."""
    template = (
        "{% for m in messages %}<|{{ m.role }}|>{{ m.reasoning_content }}"
        "{% if m.content is string %}{{ m.content }}{% else %}{% for item in m.content %}"
        "{% if item.type == 'image' %}<|begin_of_image|><|image|><|end_of_image|>{% endif %}{{ item.text }}{% endfor %}"
        "{% endif %}{% for call in m.tool_calls or [] %}{{ call.function.arguments.a }}{% endfor %}{% endfor %}"
        "{% if tools %}{% endif %}{# </think> #}"
    )
    monkeypatch.setattr(engine.processor, "chat_template", template)
    call = "<tool_call>f\n<arg_key>a</arg_key>\n<arg_value>1</arg_value>\n</tool_call>"
    texts = script(monkeypatch, engine.processor.tokenizer)
    texts += [f"<think>Hm.</think>\nI look.\n{call}{call}", "<think></think>\nOne."]
    tools = [{"type": "function", "function": {"name": "f"}}]
    talk = engine.conversation(tools=tools, max_new_tokens=60, do_sample=False)
    talk.send("Hello")
    said = talk.messages[-1]
    assert (said["content"], said["reasoning_content"], len(said["tool_calls"])) == ("I look.", "Hm.", 2)
    with pytest.raises(MessageError, match=r"results: found 1 result; expected as many as .* calls, 2"):
        talk.reply(["A"])
    items = [{"type": "text", "text": "B"}, {"type": "image", "image": pictures[0]}]
    found = last(talk.reply(["A", items]))
    assert found.answer == talk.messages[-1]["content"] == "One."
    assert [m["role"] for m in talk.messages] == ["user", "assistant", "tool", "tool", "assistant"]
    assert found.prompt_tokens == len(engine.prompt(talk.messages[:-1])) and len(found.image_sizes) == 1
    with pytest.raises(MessageError, match="calls, 0"):
        talk.reply([])
    talk.undo()
    assert talk.messages[-1] is said
