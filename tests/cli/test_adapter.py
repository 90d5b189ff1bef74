"""`--adapter`: what is applied, what is refused, and that answers of another adapter are not resumed."""

import json
import shutil

import pytest
from helpers_checkpoints import RANDOM_CHECKPOINT
from helpers_lora import trained

from glm4v_jax import Engine
from glm4v_jax.checkpoints.adapter import load_adapter, save_adapter
from glm4v_jax.checkpoints.load import load_runtime
from glm4v_jax.cli.main import main
from glm4v_jax.devices.mesh import use_mesh
from glm4v_jax.model.lora import merge_lora
from glm4v_jax.model.runtime import Runtime

ASKED = ["Hello", "--greedy", "--max-new-tokens", "8", "--dtype", "float32"]

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def runtime():
    return load_runtime(RANDOM_CHECKPOINT, dtype="float32")


@pytest.fixture(scope="module")
def adapter(runtime, tmp_path_factory):
    directory = tmp_path_factory.mktemp("adapter")
    with use_mesh(runtime.mesh):
        save_adapter(trained(runtime.module), directory, str(RANDOM_CHECKPOINT))
    return directory


@pytest.fixture
def answered(capfd):
    def run(*arguments):
        assert main(["generate", "--json", *ASKED, *map(str, arguments)]) == 0
        return json.loads(capfd.readouterr().out)

    return run


def test_answers_are_those_of_the_model_that_it_is_merged_into(answered, adapter, runtime):
    with use_mesh(runtime.mesh):
        merged = Runtime.of(merge_lora(load_adapter(runtime.module, adapter)))
    engine = Engine.from_pretrained(RANDOM_CHECKPOINT, dtype="float32", adapter=adapter)
    expected = Engine(merged, engine.processor).generate("Hello", do_sample=False, max_new_tokens=8)
    found = answered("--adapter", adapter)
    assert found["text"] == expected.text and found["adapter"] == str(adapter)
    assert engine.generate("Hello", do_sample=False, max_new_tokens=8).tokens == expected.tokens
    plain = answered()
    assert plain["text"] != expected.text and "adapter" not in plain


def test_an_adapter_of_another_model_and_ends_of_another_vocabulary_are_told(adapter, tmp_path):
    model, other = shutil.copytree(RANDOM_CHECKPOINT, tmp_path / "model"), shutil.copytree(adapter, tmp_path / "other")
    options = json.loads((other / "adapter_config.json").read_text())
    (other / "adapter_config.json").write_text(json.dumps(options | {"base_model_name_or_path": "zai-org/GLM-OCR"}))
    (model / "generation_config.json").write_text('{"eos_token_id": [151329, 151336]}')
    with pytest.warns(UserWarning) as warned:
        load_runtime(model, adapter=other)
    notes = [str(one.message) for one in warned]
    assert f"{other}: found zai-org/GLM-OCR as its base model; expected {model}: it is of use only if both" in notes[0]
    assert "eos_token_id: found [151329, 151336]; expected ids below 832, the size of the vocabulary: no" in notes[1]


def test_without_a_model_the_base_that_it_names_is_loaded(adapter, monkeypatch):
    from glm4v_jax.console import options

    monkeypatch.setattr(options, "DEFAULT_MODEL", str(options.TINY_CHECKPOINT))
    given = options.ModelOptions(directory=str(options.TINY_CHECKPOINT), adapter=str(adapter))
    given.check()
    assert given.directory == str(RANDOM_CHECKPOINT)


@pytest.mark.usefixtures("no_weights")
@pytest.mark.parametrize("command", [["generate", "Hello"], ["chat"], ["describe", "."], ["eval"]], ids=lambda c: c[0])
def test_a_directory_without_an_adapter_is_named(capfd, tmp_path, command):
    assert main([*command, "--adapter", str(tmp_path)]) == 1
    assert f"error: --adapter: found {tmp_path}, without adapter_config.json; expected" in capfd.readouterr().err


@pytest.mark.usefixtures("no_weights")
def test_an_adapter_as_the_model_is_named_with_the_command_for_it(capfd, adapter):
    assert main(["generate", "Hello", "--model", str(adapter)]) == 1
    expected = f"found an adapter; expected a model: pass --model {RANDOM_CHECKPOINT} --adapter {adapter}"
    assert expected in capfd.readouterr().err


def test_answers_of_a_run_without_it_are_not_resumed(capfd, adapter, tmp_path):
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "Hello"}\n')
    batch = ["generate", "--jsonl", "prompts.jsonl", "--greedy", "--max-new-tokens", "2", "--slots", "1"]
    assert main(batch) == 0
    capfd.readouterr()
    assert main([*batch, "--adapter", str(adapter)]) == 1
    assert "prompts.answers.jsonl" in capfd.readouterr().err
