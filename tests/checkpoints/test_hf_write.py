"""A live model saved in Hugging Face layout: the same weights come back, here and in transformers."""

import errno
import json
import os

import jax
import numpy as np
import pytest
from helpers_convert import files_of, read_all
from reference import CONFIGS, load_theirs, random_tensors

from glm4v_jax import Glm4vForConditionalGeneration
from glm4v_jax.checkpoints import hf_write
from glm4v_jax.config.generation import GenerationConfig
from glm4v_jax.config.model import Glm4vConfig
from glm4v_jax.errors import CheckpointError, ConfigError

pytestmark = [pytest.mark.usefixtures("mesh"), pytest.mark.slow]


@pytest.mark.parametrize("stacked", [True, False])
@pytest.mark.parametrize("name", CONFIGS)
def test_every_tensor_comes_back(checkpoints, tmp_path, name, stacked):
    model = Glm4vForConditionalGeneration.from_pretrained(checkpoints(name), dtype="float32", stacked=stacked)
    model.save_pretrained(tmp_path / "out", max_shard_size="100KB")
    found, expected = read_all(tmp_path / "out"), random_tensors(Glm4vConfig.from_dict(CONFIGS[name]))
    assert found.keys() == expected.keys()
    for tensor, values in expected.items():
        np.testing.assert_array_equal(found[tensor], values)
    again = Glm4vForConditionalGeneration.from_pretrained(tmp_path / "out", stacked=stacked)
    jax.tree.map(np.testing.assert_array_equal, again.module, model.module)
    assert again.config == model.config


@pytest.mark.parametrize("name", ["base", "tester", "odd"])
def test_transformers_loads_it(ours, theirs, tmp_path, name):
    torch = pytest.importorskip("torch")
    ours(name).save_pretrained(tmp_path)
    model = load_theirs(tmp_path)  # asserts that no key is missing or unexpected
    ids = torch.arange(9, 25)[None]
    with torch.no_grad():
        assert torch.equal(model(input_ids=ids).logits, theirs(name)(input_ids=ids).logits)


def test_shards_and_index_are_those_of_transformers(ours, theirs, tmp_path):
    """Up to the order of tensors within the vision part, which decides what fits into which file."""
    ours("base").save_pretrained(tmp_path / "ours", max_shard_size="100KB")
    theirs("base").save_pretrained(tmp_path / "theirs", max_shard_size="100KB")
    found, expected = (json.loads((tmp_path / who / hf_write.INDEX).read_text()) for who in ("ours", "theirs"))
    assert found["metadata"] == expected["metadata"] and found["weight_map"].keys() == expected["weight_map"].keys()
    ours("base").save_pretrained(tmp_path / "ours")
    theirs("base").save_pretrained(tmp_path / "theirs")
    single = [(tmp_path / who / hf_write.SINGLE).read_bytes() for who in ("ours", "theirs")]
    assert single[0] == single[1]


def test_the_dtype_of_the_model_is_written(checkpoints, tmp_path):
    model = Glm4vForConditionalGeneration.from_pretrained(checkpoints("base"), dtype="bfloat16")
    model.save_pretrained(tmp_path)
    assert {tensor.dtype.name for tensor in read_all(tmp_path).values()} == {"bfloat16"}
    assert json.loads((tmp_path / "config.json").read_text())["dtype"] == "bfloat16"


def test_a_configuration_that_is_there_keeps_its_other_fields(ours, tmp_path):
    """Of the same model; that of another one is replaced."""
    for name in ("base", "odd"):
        (tmp_path / "config.json").write_text(json.dumps(CONFIGS[name] | {"of_tomorrow": 1, "torch_dtype": "float16"}))
        ours("base").save_pretrained(tmp_path)
        found = json.loads((tmp_path / "config.json").read_text())
        if name == "base":
            assert found == CONFIGS[name] | {"of_tomorrow": 1, "torch_dtype": "float32"}
        else:
            assert found == ours("base").config.to_dict() | {"dtype": "float32"}


def test_other_files_are_kept_and_old_shards_removed(ours, tmp_path):
    (tmp_path / "tokenizer.json").write_text("{}")
    ours("base").save_pretrained(tmp_path, max_shard_size="100KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 3
    ours("base").save_pretrained(tmp_path)
    assert sorted(os.listdir(tmp_path)) == [
        "config.json", "generation_config.json", "model.safetensors", "tokenizer.json",
    ]  # fmt: skip


def test_a_full_disk_leaves_the_old_weights(ours, tmp_path, monkeypatch):
    ours("base").save_pretrained(tmp_path)
    before = files_of(tmp_path)
    write, count = hf_write.write_safetensors, 0

    def failing(*arguments):
        nonlocal count
        count += 1
        if count == 3:
            raise OSError(errno.ENOSPC, "No space left on device")
        write(*arguments)

    monkeypatch.setattr(hf_write, "write_safetensors", failing)
    with pytest.raises(OSError, match="No space"):
        ours("base").save_pretrained(tmp_path, max_shard_size="100KB")
    assert files_of(tmp_path) == before


def test_an_invalid_shard_size_is_refused_before_writing(ours, tmp_path):
    with pytest.raises(ConfigError, match="max_shard_size"):
        ours("base").save_pretrained(tmp_path / "out", max_shard_size="many")
    assert os.listdir(tmp_path) == []


def test_a_file_in_the_place_of_the_directory_is_refused(ours, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="file: found a file"):
        ours("base").save_pretrained(tmp_path / "file")


@pytest.mark.parametrize(
    ("text", "size"),
    [("5GB", 5 * 10**9), ("200MiB", 200 * 2**20), ("1.5kb", 1500), (" 3 TB ", 3 * 10**12), ("77", 77), (88, 88)],
)
def test_sizes_of_shards_are_parsed(text, size):
    assert hf_write.parse_size(text) == size


@pytest.mark.parametrize("text", ["", "GB", "5XB", "-1GB", "0", "0.1", "5 G", "1e9", "nan"])
def test_invalid_sizes_of_shards_are_refused(text):
    with pytest.raises(ConfigError, match=r"max_shard_size: found .* expected a size such as 5GB"):
        hf_write.parse_size(text)


def test_generation_options_come_back(tmp_path):
    config = GenerationConfig(do_sample=True, top_k=2, top_p=0.6, temperature=0.8, eos_token_id=(3, 5), pad_token_id=3)
    options = config.changed()
    assert options == {
        "do_sample": True, "top_k": 2, "top_p": 0.6, "temperature": 0.8, "eos_token_id": [3, 5], "pad_token_id": 3,
    }  # fmt: skip
    assert GenerationConfig.from_dict(options) == config
    assert GenerationConfig().changed() == {}


def test_bans_and_biases_come_back_here_and_in_transformers(tmp_path):
    transformers = pytest.importorskip("transformers")
    options = dict(
        min_new_tokens=3, no_repeat_ngram_size=2, bad_words_ids=[[1, 2]], suppress_tokens=[4], eos_token_id=[7],
        sequence_bias=[[[1], 2.0], [[5, 6], float("-inf")]], output_scores=True, return_dict_in_generate=True,
    )  # fmt: skip
    hf_write.save_generation_config(GenerationConfig(**options, logits_processor=max), tmp_path)
    assert GenerationConfig.from_pretrained(tmp_path) == GenerationConfig(**options)
    theirs = transformers.GenerationConfig.from_pretrained(tmp_path)
    assert {name: getattr(theirs, name) for name in options} == options
