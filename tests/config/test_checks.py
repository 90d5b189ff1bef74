"""Constraints of settings: what fits, what does not, and how it is reported."""

import dataclasses
from collections.abc import Mapping
from typing import Annotated, Literal

import numpy as np
import pytest
from msgspec import Meta

from eval.data.rows import read as read_item
from eval.tasks import Task, find_task
from glm4v_jax.config import checks, presets
from glm4v_jax.config.checks import AnyNumber, Natural, Positive, PositiveNumber, Seed, from_mapping, validate
from glm4v_jax.config.generation import GenerationConfig
from glm4v_jax.errors import ConfigError, Glm4vError, one_line
from glm4v_jax.planning import mesh_presets
from train.data.formats import detect, read_row


@dataclasses.dataclass(frozen=True)
class Part:
    rows: Positive = 1
    rate: PositiveNumber | None = None

    def __post_init__(self) -> None:
        validate(self)


@dataclasses.dataclass(frozen=True)
class Whole:
    name: str
    files: Annotated[tuple[str, ...], Meta(min_length=1, description="at least one file")] = ("a",)
    kind: Literal["a", "b"] = "a"
    part: Part = dataclasses.field(default_factory=Part)
    extra: Part | None = None
    rates: Mapping[str, float] = dataclasses.field(default_factory=dict)
    limit: AnyNumber = float("inf")
    pair: tuple[Natural, Natural] = (0, 0)
    seed: Seed = 0
    flag: bool = False

    def __post_init__(self) -> None:
        validate(self)


def test_values_are_kept_as_their_annotations_say():
    whole = from_mapping(
        Whole, {"name": "x", "files": ["b"], "part": {"rate": 1}, "rates": {"a": 1}, "pair": np.array([1, 2])}
    )
    assert whole == Whole("x", ("b",), part=Part(rate=1.0), rates={"a": 1.0}, pair=(1, 2))
    assert isinstance(whole.part.rate, float) and isinstance(whole.rates["a"], float)
    assert type(Part(rows=np.int64(3)).rows) is int


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({}, "name: found nothing; expected a string"),
        ({"name": 1}, "name: found 1; expected a string"),
        ({"name": "x", "nmae": 1}, "nmae: found an unknown field; expected some of name, files, "),
        ({"name": "x", "files": []}, "files: found []; expected at least one file"),
        ({"name": "x", "kind": "c"}, "kind: found 'c'; expected one of 'a', 'b'"),
        ({"name": "x", "part": 1}, "part: found 1; expected an object"),
        ({"name": "x", "part": {"rows": 0}}, "part.rows: found 0; expected an integer of at least 1"),
        ({"name": "x", "part": {"rows": True}}, "part.rows: found True; expected an integer of at least 1"),
        ({"name": "x", "part": {"rows": 1.5}}, "part.rows: found 1.5; expected an integer of at least 1"),
        ({"name": "x", "extra": {"rate": 0}}, "extra.rate: found 0; expected a number above 0"),
        ({"name": "x", "extra": {"rate": float("nan")}}, "extra.rate: found nan; expected a number above 0"),
        ({"name": "x", "extra": {"rate": float("inf")}}, "extra.rate: found inf; expected a number above 0"),
        ({"name": "x", "rates": {"a": "b"}}, "rates: found {'a': 'b'}; expected an object"),
        ({"name": "x", "pair": [1, -1]}, "pair: found [1, -1]; expected 2 integers of at least 0"),
        ({"name": "x", "seed": 2**32}, "seed: found 4294967296; expected an integer from 0 to 4294967295"),
        ({"name": "x", "flag": 1}, "flag: found 1; expected true or false"),
        ([1], "content: found [1]; expected an object"),
        ({"name": 1, "part": {"rows": 0, "rate": 0}, "seed": -1},
         "part.rows: found 0; expected an integer of at least 1; part.rate: found 0; expected a number above 0; "
         "name: found 1; expected a string; seed: found -1; expected an integer from 0 to 4294967295"),
    ],
)  # fmt: skip
def test_every_fault_is_named(content, message):
    with pytest.raises(ConfigError) as raised:
        from_mapping(Whole, content)
    assert str(raised.value).startswith(message)


def test_an_error_of_a_nested_object_that_lists_no_faults_is_reported():
    @dataclasses.dataclass(frozen=True)
    class Strict(Part):
        def __post_init__(self) -> None:
            raise ConfigError("rows: found too many")

    job = dataclasses.make_dataclass("Job", [("part", Strict | None, None), ("count", int, 1)])
    with pytest.raises(ConfigError, match=r"^part\.rows: found too many; count: found 'a'; expected an integer$"):
        from_mapping(job, {"part": {"rows": 2}, "count": "a"})
    with pytest.raises(ConfigError, match=r"^job\.part\.rows: found too many$"):
        from_mapping(job, {"part": {"rows": 2}}, where="job.")


def test_faults_are_one_line_whatever_they_found():
    with pytest.raises(ConfigError) as caught:
        checks.raise_faults(["a: found b\nc", "d: found e"], where="file")
    assert str(caught.value) == one_line(caught.value) == "file: a: found b c; d: found e"
    assert caught.value.faults == ("a: found b\nc", "d: found e")


def test_a_misspelt_field_suggests_the_right_one():
    with pytest.raises(
        ConfigError, match=r"rwos: found an unknown field; expected some of rows, rate; did you mean 'rows'\?"
    ):
        from_mapping(Part, {"rwos": 1})


@pytest.mark.parametrize(
    ("call", "meant"),
    [
        (lambda: presets.preset("gredy"), "greedy"),
        (lambda: mesh_presets.check_text("latncy"), "latency"),
        (lambda: mesh_presets.check_text("fdsp=4,kv=2"), "fsdp"),
        (lambda: GenerationConfig().replace(temprature=0.5), "temperature"),
        (lambda: find_task("refcocoo"), "refcoco"),
        (lambda: find_task("textvqa@lmms_eval"), "lmms-eval"),
        (lambda: Task("mine", "anlz"), "anls"),
        (lambda: list(read_item({"quesion": "Why?", "answer": "So."}, None)), "quesion"),
        (lambda: detect({"mesages": []}), "messages"),
        (lambda: read_row({"messages": [{"role": "assitant", "content": "!"}]}, "openai"), "assistant"),
        (lambda: Task("mine", "anls", preset="bnch"), "bench"),
        (lambda: checks.checked("shape", "sqare", Literal["square", "round"] | None), "square"),
    ],
)
def test_a_near_miss_of_any_name_is_suggested(call, meant):
    with pytest.raises(Glm4vError, match=rf"; (did you mean|is it) '{meant}'\?"):
        call()


def test_keys_can_be_passed_over():
    assert from_mapping(Part, {"rows": 2, "novel": 1}, ignore_unknown=True) == Part(2)
