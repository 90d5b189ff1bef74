"""The model for lmms-eval, on stand-ins for lmms-eval's classes; `bench.lmms_eval` runs the real one."""

import collections
import importlib
import logging
import sys
import types

import PIL.Image
import pytest

from eval.read_items import read_items
from eval.tasks import TASKS
from glm4v_jax.config.presets import PRESETS
from glm4v_jax.errors import ConfigError, GenerationError
from glm4v_jax.generate.completion import Completion
from glm4v_jax.tiny import TINY_CHECKPOINT

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("stacked_layers")]

GenerationResult = collections.namedtuple("GenerationResult", "text token_counts")
TokenCounts = collections.namedtuple("TokenCounts", "input_tokens output_tokens")
Request = collections.namedtuple("Request", "args")


class Lmms:
    def __init__(self):
        self.task_dict, self.cached = {}, []
        self.cache_hook = types.SimpleNamespace(add_partial=lambda *given: self.cached.append(given))


@pytest.fixture(scope="module")
def lmms():
    """The module, loaded beside the stand-ins."""
    stubs = {
        "lmms_eval": {},
        "lmms_eval.api": {},
        "lmms_eval.api.instance": dict(GenerationResult=GenerationResult, Instance=Request, TokenCounts=TokenCounts),
        "lmms_eval.api.model": dict(lmms=Lmms),
        "lmms_eval.models": {},
        "lmms_eval.models.registry_v2": dict(ModelManifest=types.SimpleNamespace),
    }
    with pytest.MonkeyPatch.context() as patch:
        for name, content in stubs.items():
            module = types.ModuleType(name)
            vars(module).update(content)
            patch.setitem(sys.modules, name, module)
        patch.delitem(sys.modules, "eval.lmms", raising=False)
        yield importlib.import_module("eval.lmms")
    sys.modules.pop("eval.lmms", None)


@pytest.fixture(scope="module")
def model(lmms):
    return lmms.Glm4vJax(str(TINY_CHECKPOINT), slots=2)


def requests(model, documents, **options):
    """As lmms-eval makes them: of the numbers of documents."""
    model.task_dict = {"digits": {"test": documents}}

    def to_messages(document):
        image, text = document
        content = [{"type": "image", "url": image}, {"type": "text", "text": text}]
        return [{"role": "user", "content": content}]

    return [Request((f"{i}", to_messages, options, i, "digits", "test")) for i in range(len(documents))]


def documents(count):
    items = read_items(TASKS["digits-vqa"], limit=count)
    return [(item.images[0], item.question) for item in items], items


@pytest.mark.slow
def test_requests_are_answered_in_their_order_without_the_limits_of_tasks(model):
    asked, items = documents(5)
    found = model.generate_until(requests(model, asked, max_new_tokens=2, temperature=0, do_sample=False, until=["\n"]))
    assert [result.text for result in found] == [item.reference["answer"] for item in items]
    assert all(result.token_counts.input_tokens > 4 < result.token_counts.output_tokens for result in found)
    assert sorted(given[1][0] for given in model.cached) == list("01234")


def test_a_request_that_fails_has_an_empty_answer(model, caplog):
    asked, items = documents(3)
    asked[1] = ("/nowhere/image.png", asked[1][1])
    with caplog.at_level(logging.WARNING):
        found = model.generate_until(requests(model, asked, temperature=0))
    expected = [item.reference["answer"] for item in items]
    assert [result.text for result in found] == [expected[0], "", expected[2]]
    assert "request 1 failed" in caplog.text and "image.png" in caplog.text


def test_stop_strings_end_the_answer_and_not_the_thought(lmms, model):
    completion = Completion(0, "<think>One.\n\nTwo.</think><answer>seven\n\nor so", (1,), 1, "stop")
    assert model._text(completion, {"until": ["\n\n"]}) == "seven"
    assert model._text(completion, {}) == "seven\n\nor so"


def test_unknown_options_are_errors(lmms, model):
    asked, _ = documents(1)
    with pytest.raises(GenerationError, match="generation_kwargs: found 'beams'; expected some of temperature"):
        model.generate_until(requests(model, asked, beams=3))
    with pytest.raises(GenerationError, match="num_beams: found 4; expected 1"):
        model.generate_until(requests(model, asked, num_beams=4))
    with pytest.raises(ConfigError, match="answer: found 'half'; expected one of boxed, answer, raw"):
        lmms.Glm4vJax(answer="half")


def test_the_manifest_names_the_class(lmms):
    manifest = lmms.manifest()
    module, name = manifest.chat_class_path.rsplit(".", 1)
    assert (manifest.model_id, getattr(importlib.import_module(module), name)) == ("glm4v_jax", lmms.Glm4vJax)
    assert not lmms.Glm4vJax.is_simple


def test_messages_have_text_images_and_videos(lmms):
    with pytest.raises(GenerationError, match="content: found the type 'audio'; expected text, image or video"):
        lmms._message({"role": "user", "content": [{"type": "audio", "url": "a.wav"}]})
    image = PIL.Image.new("RGB", (8, 8))
    message = lmms._message({"role": "user", "content": [{"type": "image", "url": image}]})
    assert message["content"] == [{"type": "image", "image": image}]


class StandIn:
    """Keeps requests, and answers all of them equally, the last one first."""

    text, finish_reason = "<think>It is 3.</think><answer>So <|begin_of_box|>3<|end_of_box|></answer>", "stop"

    def __init__(self):
        self.requests, self.presets = [], []

    def config(self, preset, **options):
        self.presets.append((preset, options))

    def generate_many(self, requests, *, preset, skip_errors):
        assert skip_errors
        self.requests = list(requests)
        self.presets.append((preset, {}))
        for index in reversed(range(len(self.requests))):
            yield Completion(index, self.text, (1,) * (index + 1), 9, self.finish_reason)


@pytest.fixture
def engine(lmms, monkeypatch):
    engine = StandIn()
    monkeypatch.setattr(lmms.Engine, "from_pretrained", lambda *_, **__: engine)
    return engine


def asked(model, *messages, **options):
    """The texts that lmms-eval gets for a request of these messages, each of a document of its own."""
    model.task_dict = {"task": {"test": messages}}
    found = model.generate_until([
        Request((f"{i}", list, options, i, "task", "test")) for i in range(len(messages))
    ])  # fmt: skip
    assert [result.token_counts.output_tokens for result in found] == [1 + i for i in range(len(messages))]
    return [result.text for result in found]


def text(role, text):
    return {"role": role, "content": [{"type": "text", "text": text}]}


@pytest.mark.parametrize(("form", "scored"), [("boxed", "3"), ("answer", "So 3"), ("raw", StandIn.text)])
def test_the_text_that_tasks_score(lmms, engine, form, scored):
    assert asked(lmms.Glm4vJax(answer=form), [text("user", "How many?")]) == [scored]


def test_prompts_may_have_videos_and_several_turns(lmms, engine):
    """As tasks of few shots have them."""
    video = {"role": "user", "content": [{"type": "video", "url": "a.mp4"}, {"type": "text", "text": "Which way?"}]}
    asked(lmms.Glm4vJax(), [text("user", "Hm?"), text("assistant", "Left."), video], [text("user", "And?")])
    first, second = (request.prompt for request in engine.requests)
    shown = [{"type": "video", "video": "a.mp4"}, {"type": "text", "text": "Which way?"}]
    assert first == [text("user", "Hm?"), text("assistant", "Left."), {"role": "user", "content": shown}]
    assert second == [text("user", "And?")]


def test_the_system_message_is_first_and_only_one(lmms, engine):
    model = lmms.Glm4vJax(system="Be brief.")
    asked(model, [text("user", "What?")], [text("system", "Be exact."), text("user", "Who?")])
    assert [request.prompt for request in engine.requests] == [
        [text("system", "Be brief."), text("user", "What?")],
        [text("system", "Be exact."), text("user", "Who?")],
    ]
    asked(lmms.Glm4vJax(), [text("user", "What?")])
    assert engine.requests[0].prompt == [text("user", "What?")]


LIMITS = {"max_new_tokens": 9, "think_budget": 4}
BUDGETS = {name: PRESETS["bench"].options[name] for name in ("max_new_tokens", "think_budget", "answer_budget")}


@pytest.mark.parametrize(
    ("arguments", "options"),
    [
        ({}, {"temperature": 0.5, **BUDGETS}),
        ({"answer_budget": 9}, {"temperature": 0.5, **BUDGETS, "answer_budget": 9}),
        ({"max_new_tokens": 9}, {"temperature": 0.5, "max_new_tokens": 9}),
        (LIMITS, {"temperature": 0.5, **BUDGETS, **LIMITS}),
        ({"preset": "greedy"}, {}),
        ({"preset": "greedy", "max_new_tokens": 9}, {"max_new_tokens": 9}),
    ],
)
def test_budgets_are_ours_and_sampling_is_the_tasks_unless_there_is_a_preset(lmms, engine, arguments, options):
    asked(lmms.Glm4vJax(**arguments), [text("user", "What?")], temperature=0.5, max_new_tokens=16)
    (request,) = engine.requests
    assert request.options == options
    preset = arguments.get("preset")
    # Checked when the model is made, and used when it is asked.
    over = {name: value for name, value in options.items() if name != "temperature"}
    assert engine.presets == [(preset, over), (preset, {})]


def test_unfinished_thoughts_are_logged(lmms, engine, caplog):
    engine.text, engine.finish_reason = "<think>Hm, hm,", "length"
    with caplog.at_level(logging.WARNING):
        assert asked(lmms.Glm4vJax(), [text("user", "What?")], [text("user", "Who?")]) == ["", ""]
    assert "2 of 2 answers ended within their thought: max_new_tokens is too low" in caplog.text


@pytest.mark.parametrize(
    ("name", "message"), [("generate_until_multi_round", "several rounds"), ("loglikelihood", "scored by likelihood")]
)
def test_other_kinds_of_tasks_are_errors(lmms, engine, name, message):
    with pytest.raises(NotImplementedError, match=f"glm4v_jax: found a task .*{message}; expected one that generates"):
        getattr(lmms.Glm4vJax(), name)([])
