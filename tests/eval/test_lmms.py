"""The model for lmms-eval, on stand-ins for what it takes of lmms-eval; `bench.lmms_eval` runs the real one."""

import dataclasses
import importlib
import logging
import sys
import types

import PIL.Image
import pytest

from eval.tasks import TASKS, read_items
from glm4v_jax.data import TINY_CHECKPOINT
from glm4v_jax.errors import ConfigError, GenerationError


@dataclasses.dataclass
class GenerationResult:
    text: str
    token_counts: object


@dataclasses.dataclass
class TokenCounts:
    input_tokens: int
    output_tokens: int


@dataclasses.dataclass
class Request:
    args: tuple


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
        picture, text = document
        content = [{"type": "image", "url": picture}, {"type": "text", "text": text}]
        return [{"role": "user", "content": content}]

    return [Request((f"{i}", to_messages, options, i, "digits", "test")) for i in range(len(documents))]


def documents(count):
    items = read_items(TASKS["digits-vqa"], limit=count)
    pictures = [next(part["image"] for part in item.messages[-1]["content"] if "image" in part) for item in items]
    return [(picture, item.question) for picture, item in zip(pictures, items, strict=True)], items


def test_requests_are_answered_in_their_order(model):
    """With limits that are meant for models that do not think, which are not taken."""
    asked, items = documents(5)
    found = model.generate_until(requests(model, asked, max_new_tokens=2, temperature=0, do_sample=False, until=["\n"]))
    assert [result.text for result in found] == [item.reference["answer"] for item in items]
    assert all(result.token_counts.input_tokens > 4 < result.token_counts.output_tokens for result in found)
    assert sorted(given[1][0] for given in model.cached) == list("01234")


def test_a_request_that_fails_is_empty_and_the_others_are_answered(model, caplog):
    asked, items = documents(3)
    asked[1] = ("/nowhere/picture.png", asked[1][1])
    with caplog.at_level(logging.WARNING):
        found = model.generate_until(requests(model, asked, temperature=0))
    expected = [item.reference["answer"] for item in items]
    assert [result.text for result in found] == [expected[0], "", expected[2]]
    assert "request 1 is not answered" in caplog.text and "picture.png" in caplog.text


def test_stop_strings_end_the_answer_and_not_the_thought(lmms, model):
    completion = importlib.import_module("glm4v_jax.generate.completion").Completion(
        0, "<think>One.\n\nTwo.</think><answer>seven\n\nor so", (1,), 1, "stop"
    )
    assert model._text(completion, {"until": ["\n\n"]}) == "seven"
    assert model._text(completion, {}) == "seven\n\nor so"


def test_options_that_nobody_knows_are_refused_before_anything_is_generated(lmms, model):
    asked, _ = documents(1)
    with pytest.raises(GenerationError, match="generation_kwargs: found 'beams'; expected some of temperature"):
        model.generate_until(requests(model, asked, beams=3))
    with pytest.raises(GenerationError, match="num_beams: found 4; expected 1"):
        model.generate_until(requests(model, asked, num_beams=4))
    with pytest.raises(ConfigError, match="answer: found 'half'; expected one of boxed, answer, raw"):
        lmms.Glm4vJax(answer="half")


def test_what_lmms_eval_is_told(lmms):
    manifest = lmms.manifest()
    module, name = manifest.chat_class_path.rsplit(".", 1)
    assert (manifest.model_id, getattr(importlib.import_module(module), name)) == ("glm4v_jax", lmms.Glm4vJax)
    assert not lmms.Glm4vJax.is_simple


def test_content_of_another_kind_is_refused(lmms):
    with pytest.raises(GenerationError, match="content of type 'audio': expected text, image or video"):
        lmms._message({"role": "user", "content": [{"type": "audio", "url": "a.wav"}]})
    picture = PIL.Image.new("RGB", (8, 8))
    told = lmms._message({"role": "user", "content": [{"type": "image", "url": picture}]})
    assert told["content"] == [{"type": "image", "image": picture}]
