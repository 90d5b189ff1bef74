"""Random checkpoints: sharded like the released one, the same everywhere, and sane."""

import functools
import hashlib
import json
import os

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from helpers_convert import files_of, read_all
from reference import CONFIGS

from convert.synth import load_config, plan_like_released, random_tensor, synth
from convert.verify import verify
from glm4v_jax import Glm4vForConditionalGeneration, Glm4vProcessor
from glm4v_jax.checkpoints.hf_write import tensor_shapes
from glm4v_jax.checkpoints.safetensors import CHUNK_BYTES
from glm4v_jax.config.family import ARCHITECTURES
from glm4v_jax.config.generation import GenerationConfig
from glm4v_jax.config.members import MEMBERS
from glm4v_jax.config.model import Glm4vConfig
from glm4v_jax.errors import CheckpointError, ConfigError

# SHA-256 of the lines "tensor file\n", sorted, of model.safetensors.index.json of zai-org/GLM-4.1V-9B-Thinking.
RELEASED_WEIGHT_MAP = "5f06202ee1d87776f89f979ae99e917cfcc0728c6c9ed1e431f4b856dee3c0d5"
# Of the tiny model in bfloat16 with seed 0, as `verify` computes it.
TINY = "5a684c954eb0c0f1cccce6bf143a757940fbb4edca2a2b13d3a8a6d63e6518a8"


def test_the_full_one_is_sharded_like_the_released():
    config = load_config("full")
    plan, shapes = plan_like_released(config, 4), tensor_shapes(config)
    lines = sorted(f"{name} {file}\n" for file, names in plan.items() for name in names)
    assert hashlib.sha256("".join(lines).encode()).hexdigest() == RELEASED_WEIGHT_MAP
    assert len(lines) == len(shapes) == 704
    assert sum(2 * int(np.prod(shape)) for shape in shapes.values()) == 20_585_554_944


def test_the_numbers_are_the_same_everywhere(synthetic):
    assert verify(synthetic(), synthetic()).left_checksum == TINY
    assert not verify(synthetic(count=1), synthetic(count=3)).different()


def test_a_seed_gives_the_same_files_and_another_gives_others(tmp_path):
    config = load_config("tiny")
    for name, seed in (("a", 5), ("b", 5), ("c", 6)):
        synth(config, tmp_path / name, seed=seed)
    assert files_of(tmp_path / "a") == files_of(tmp_path / "b")
    first, other = read_all(tmp_path / "a"), read_all(tmp_path / "c")
    assert all(tensor.tobytes() != other[name].tobytes() for name, tensor in first.items())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_numbers_are_normally_distributed(dtype):
    dtype = np.dtype(ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype)
    weight = np.asarray(random_tensor((1000, 300), dtype, "a.weight", 0.02, 0)).astype(np.float64) / 0.02
    assert np.asarray(random_tensor((1000, 300), dtype, "a.weight", 0.02, 0)).dtype == dtype
    assert abs(weight.mean()) < 0.01 and abs(weight.std() - 1) < 0.01
    assert abs((weight**4).mean() - 3) < 0.1  # a normal distribution's, and not a uniform one's
    assert abs((np.abs(weight) < 1).mean() - 0.6827) < 0.01
    norm = np.asarray(random_tensor((2000,), dtype, "norm.weight", 0.02, 0)).astype(np.float64)
    assert abs(norm.mean() - 1) < 0.01 and 0.01 < norm.std() < 0.03
    bias = np.asarray(random_tensor((2000,), dtype, "a.bias", 0.02, 0)).astype(np.float64)
    assert 0.001 < bias.std() < 0.003


def test_a_large_tensor_comes_in_chunks():
    tensor = random_tensor((CHUNK_BYTES // 4, 3), np.dtype(np.float16), "a.weight", 0.02, 0)
    sizes = [chunk.nbytes for chunk in tensor.chunks()]
    assert sum(sizes) == 6 * (CHUNK_BYTES // 4) and max(sizes) <= CHUNK_BYTES


def test_the_tiny_one_loads_with_its_processor(synthetic):
    Glm4vProcessor.from_pretrained(synthetic())
    assert GenerationConfig.from_pretrained(synthetic()).top_k == 2
    assert Glm4vConfig.from_pretrained(synthetic()) == load_config("tiny")
    model = Glm4vForConditionalGeneration.from_pretrained(synthetic())
    logits = model(np.arange(3, 19)[None]).logits
    assert bool(jnp.isfinite(logits).all()) and 0.01 < float(jnp.std(logits)) < 10


@pytest.fixture(scope="session")
def member_checkpoint(tmp_path_factory):
    """name -> directory of a released checkpoint at tiny size."""
    directory = tmp_path_factory.mktemp("members")

    @functools.cache
    def get(name):
        synth(load_config(name, tiny=True), directory / name, member=MEMBERS[name])
        return directory / name

    return get


@pytest.mark.parametrize(
    ("name", "files", "time"),
    [
        ("GLM-4.1V-9B-Thinking", ("preprocessor", "video_preprocessor"), "{whole}"),
        ("GLM-4.6V-Flash", ("preprocessor", "video_preprocessor"), "{seconds:.1f} seconds"),
        ("GLM-GA", ("processor",), "{seconds:.1f} seconds"),
        ("GLM-OCR", ("preprocessor",), "{seconds:.1f} seconds"),
    ],
)
def test_a_member_has_its_own_files(member_checkpoint, name, files, time):
    directory, member = member_checkpoint(name), MEMBERS[name]
    assert {path.stem.removesuffix("_config") for path in directory.glob("*processor_config.json")} == set(files)
    content = json.loads((directory / "config.json").read_text())
    assert content["model_type"] == member.model_type
    assert content["architectures"] == [ARCHITECTURES[member.model_type].model_class]
    assert len(list(directory.glob("*.safetensors"))) == member.shards
    config, processor = load_config(name, tiny=True), Glm4vProcessor.from_pretrained(directory)
    assert Glm4vConfig.from_pretrained(directory) == config
    generation = GenerationConfig.from_pretrained(directory)
    assert generation.eos_token_id == config.text_config.eos_token_id
    assert generation.do_sample == (name != "GLM-OCR")
    assert processor.row.time_text == time
    has_tools = "<tool_call>" in (directory / "chat_template.jinja").read_text()
    assert has_tools == (name != "GLM-4.1V-9B-Thinking")
    # Special tokens are tokens of their own, and images those of the configuration.
    tokens = processor.tokenizer("<tool_call>").input_ids
    assert (len(tokens[0] if isinstance(tokens[0], list) else tokens) == 1) == has_tools
    assert processor.image_token_id == config.image_token_id


def test_only_released_checkpoints_have_a_tiny_size():
    with pytest.raises(ConfigError, match=r"--tiny with --config: found 'a.json'; expected one of GLM-4.1V"):
        load_config("a.json", tiny=True)


def test_another_vocabulary_has_no_tokenizer(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(CONFIGS["base"]))
    summary = synth(load_config(str(tmp_path / "config.json")), tmp_path / "out", dtype="float32")
    assert summary.notes and not list((tmp_path / "out").glob("tokenizer*"))
    assert Glm4vConfig.from_pretrained(tmp_path / "out") == Glm4vConfig.from_dict(CONFIGS["base"])
    assert summary.files == 3 and summary.tensors == len(read_all(tmp_path / "out"))
    assert load_config(str(tmp_path / "out")) == load_config(str(tmp_path / "config.json"))


def test_transformers_loads_it(synthetic):
    from reference import load_theirs

    pytest.importorskip("transformers")
    assert load_theirs(synthetic()).num_parameters() == 1_344_096


@pytest.mark.parametrize("count", [0, -1, 6])
def test_more_shards_than_layers_are_refused(tmp_path, count):
    with pytest.raises(ConfigError, match=f"shards: found {count}; expected 1 to 5"):
        synth(load_config("tiny"), tmp_path / "out", count=count)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("count", [1, 2, 3, 4, 7, 40, 41])
def test_every_tensor_is_in_one_shard(count):
    config = load_config("full")
    plan = plan_like_released(config, count)
    assert len(plan) == count and all(plan.values())
    assert sorted(name for names in plan.values() for name in names) == sorted(tensor_shapes(config))


def test_a_dry_run_writes_nothing(tmp_path):
    assert synth(load_config("tiny"), tmp_path / "out", dry_run=True).dry_run and os.listdir(tmp_path) == []


def test_other_files_are_not_replaced(tmp_path):
    (tmp_path / "mine").write_text("kept")
    with pytest.raises(CheckpointError, match="which is not a checkpoint"):
        synth(load_config("tiny"), tmp_path)


@pytest.mark.parametrize("name", ["GLM-4.6", "nowhere.json"])
def test_a_name_that_is_neither_a_checkpoints_nor_a_files(name):
    with pytest.raises(ConfigError, match=f"--config: found '{name}'; expected tiny, full, GLM-4.1V.*or a config.json"):
        load_config(name)


def test_another_models_configuration_is_refused(tmp_path):
    (tmp_path / "bad.json").write_text('{"model_type": "llama"}')
    with pytest.raises(ConfigError, match=r"bad.json: .*llama"):
        load_config(str(tmp_path / "bad.json"))
