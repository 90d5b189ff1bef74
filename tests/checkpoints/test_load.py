"""Checkpoints on disk -> the model, exactly: dtypes, shards, damage, and what is checked before anything is read."""

import contextlib
import dataclasses
import itertools
import json
import pickle
import threading
import warnings

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from reference import CONFIGS, export, random_tensors

from convert.quantize import quantize
from glm4v_jax import Glm4vForConditionalGeneration
from glm4v_jax.checkpoints import load, plan
from glm4v_jax.checkpoints.load import load_model, load_runtime, resolve_dtype
from glm4v_jax.checkpoints.plan import device_bytes
from glm4v_jax.checkpoints.safetensors import CheckpointFiles, write_safetensors
from glm4v_jax.config.model import Glm4vConfig
from glm4v_jax.config.quantization import StoredQuantization
from glm4v_jax.devices.memory import Memory
from glm4v_jax.errors import CheckpointError, ConfigError, MemoryShortageError
from glm4v_jax.model import cpu_matmul
from glm4v_jax.model.params import default_dtype
from glm4v_jax.model.quantize import QuantConfig
from glm4v_jax.model.runtime import Runtime

CONFIG = Glm4vConfig.from_dict(CONFIGS["base"])

pytestmark = pytest.mark.usefixtures("mesh")


def assert_same_tensors(model, tensors, dtype=np.float32):
    found = export(model, model.config)
    assert found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert found[name].dtype == dtype
        np.testing.assert_array_equal(found[name].astype(np.float32), tensor.astype(dtype).astype(np.float32), name)


@pytest.mark.parametrize("stacked", [True, False])
@pytest.mark.parametrize("name", CONFIGS)
def test_every_tensor_arrives_unchanged(checkpoints, name, stacked):
    config = Glm4vConfig.from_dict(CONFIGS[name])
    model = load_model(checkpoints(name), config, dtype="float32", stacked=stacked)
    assert_same_tensors(model, random_tensors(config))


@pytest.fixture
def directory(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(CONFIGS["base"]), encoding="utf-8")
    return tmp_path


def write(directory, tensors, shards=1):
    if shards == 1:
        write_safetensors(directory / "model.safetensors", tensors)
        return
    names, weight_map = list(tensors), {}
    for i in range(shards):
        file = f"model-{i + 1:05d}-of-{shards:05d}.safetensors"
        write_safetensors(directory / file, {name: tensors[name] for name in names[i::shards]})
        weight_map |= dict.fromkeys(names[i::shards], file)
    index = {"metadata": {"total_size": 0}, "weight_map": weight_map}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")


@pytest.mark.slow
@pytest.mark.parametrize("stored", [ml_dtypes.bfloat16, np.float16])
def test_a_checkpoint_of_half_width_is_read_exactly(directory, stored):
    tensors = {name: tensor.astype(stored) for name, tensor in random_tensors(CONFIG).items()}
    write(directory, tensors)
    assert_same_tensors(load_model(directory, CONFIG, dtype="float32"), tensors)
    assert_same_tensors(load_model(directory, CONFIG, dtype="auto"), tensors, stored)


def test_float32_is_rounded_to_the_dtype_asked_for(checkpoints):
    """Round to nearest even, as torch does."""
    assert_same_tensors(
        load_model(checkpoints("base"), CONFIG, dtype="bf16"), random_tensors(CONFIG), ml_dtypes.bfloat16
    )


def test_float16_warns_of_overflows(checkpoints):
    with pytest.warns(UserWarning, match="float16 overflows"):
        model = Glm4vForConditionalGeneration.from_pretrained(checkpoints("tester"), torch_dtype="float16")
    assert model.dtype == np.float16 and model.num_parameters() == sum(
        x.size for x in random_tensors(Glm4vConfig.from_dict(CONFIGS["tester"])).values()
    )


@pytest.mark.parametrize(
    ("asked", "got"),
    [(None, jnp.float32), ("float32", jnp.float32), ("torch.bfloat16", jnp.bfloat16), ("half", jnp.float16),
     (jnp.bfloat16, jnp.bfloat16), (np.float32, jnp.float32), (np.dtype("float16"), jnp.float16)],
)  # fmt: skip
def test_spellings_of_a_dtype(asked, got):
    assert resolve_dtype(asked) == got
    assert default_dtype() == jnp.float32  # the tests run on a CPU


@pytest.mark.parametrize("asked", ["int8", "float64", np.int32, "auto"])
def test_other_dtypes_are_refused(asked):
    with pytest.raises(ConfigError, match=r"found .*; expected None or one of float32, bfloat16, float16"):
        resolve_dtype(asked)  # without a checkpoint, so "auto" means nothing


def test_a_checkpoint_has_a_dtype_of_its_own_to_ask_for(checkpoints):
    with pytest.raises(ConfigError, match="dtype: found 'int8'; expected None, 'auto' or one of float32, bfloat16, fl"):
        load_model(checkpoints("tester"), Glm4vConfig.from_dict(CONFIGS["tester"]), dtype="int8")


def test_layers_are_laid_out_for_the_devices_of_the_mesh(checkpoints, mesh, monkeypatch):
    """On a CPU, also where that is not what JAX would take by itself."""
    monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
    model = Glm4vForConditionalGeneration.from_pretrained(checkpoints("tester"), mesh=mesh)
    assert not model.module.language_model.layers.is_stacked and model.dtype == jnp.float32


@pytest.mark.parametrize("stacked", [True, False])
def test_shards_are_read_with_progress(directory, stacked):
    tensors = random_tensors(CONFIG, seed=3)
    write(directory, tensors, shards=3)
    progress = []
    model = load_model(directory, CONFIG, stacked=stacked, progress=lambda *now: progress.append(now))
    assert_same_tensors(model, tensors)
    total = sum(tensor.nbytes for tensor in tensors.values())
    assert progress[-1] == (total, total) and len(progress) == len(jax.tree.leaves(model.unstacked()))
    assert [done for done, _ in progress] == sorted(done for done, _ in progress)


def test_a_checkpoint_that_the_reference_saved(tmp_path, theirs, ours):
    theirs("base").save_pretrained(tmp_path, max_shard_size="100KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 3
    model = Glm4vForConditionalGeneration.from_pretrained(tmp_path)
    jax.tree.map(np.testing.assert_array_equal, model.module, ours("base").module)


def test_a_tied_checkpoint_that_the_reference_saved(tmp_path, theirs, ours):
    theirs("tester").save_pretrained(tmp_path)
    model = Glm4vForConditionalGeneration.from_pretrained(tmp_path)
    assert model.lm_head is None
    jax.tree.map(np.testing.assert_array_equal, model.module, ours("tester").module)


def test_the_model_does_not_change_with_its_file(directory):
    """Its arrays are copies, not views of the mapped file, which others may write to."""
    tensors = random_tensors(CONFIG)
    write(directory, tensors)
    model = load_model(directory, CONFIG)
    path = directory / "model.safetensors"
    with path.open("r+b") as file:
        file.seek(-path.stat().st_size // 2, 2)
        file.write(b"\xff" * (path.stat().st_size // 2))
    assert_same_tensors(model, tensors)


def test_nothing_is_read_before_everything_fits(directory, monkeypatch):
    tensors = random_tensors(CONFIG)
    tensors["model.language_model.norm.weight"] = np.ones(63, np.float32)
    write(directory, tensors)
    monkeypatch.setattr(CheckpointFiles, "read", lambda *_: pytest.fail("read a tensor"))
    with pytest.raises(CheckpointError, match=r"norm.weight: found shape \[63\] in model.safetensors; expected \[64\]"):
        Glm4vForConditionalGeneration.from_pretrained(directory)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda content: content[:-100], r"model.safetensors: found .*; expected .*, as the header says"),
        (lambda content: b"\x80" + content[1:], r"model\.safetensors"),
    ],
)
def test_damaged_weights_are_named(directory, damage, message):
    write(directory, random_tensors(CONFIG))
    path = directory / "model.safetensors"
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(CheckpointError, match=message):
        Glm4vForConditionalGeneration.from_pretrained(directory)


def test_pickled_weights_are_refused(directory):
    (directory / "pytorch_model.bin").write_bytes(pickle.dumps({}))
    with pytest.raises(CheckpointError, match="pickled weights only"):
        Glm4vForConditionalGeneration.from_pretrained(directory)


def test_a_missing_shard_is_named(directory):
    write(directory, random_tensors(CONFIG), shards=3)
    (directory / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"model-00002-of-00003\.safetensors: found no such file"):
        Glm4vForConditionalGeneration.from_pretrained(directory)


@pytest.mark.parametrize(
    ("config", "error", "message"),
    [
        (None, CheckpointError, "config.json"),
        ("{", CheckpointError, "found invalid JSON"),
        ('{"model_type": "llama"}', ConfigError, "'llama'; expected .*'glm4v'"),
    ],
)
def test_a_directory_that_is_not_a_checkpoint_is_refused(tmp_path, config, error, message):
    if config is not None:
        (tmp_path / "config.json").write_text(config, encoding="utf-8")
    with pytest.raises(error, match=message):
        Glm4vForConditionalGeneration.from_pretrained(tmp_path)


def test_a_missing_directory_is_named(tmp_path):
    with pytest.raises(CheckpointError, match="nowhere"):
        Glm4vForConditionalGeneration.from_pretrained(tmp_path / "nowhere")


def test_a_contradictory_rope_is_refused_before_weights(directory):
    config = json.loads(json.dumps(CONFIGS["base"]))
    config["text_config"]["rope_scaling"]["mrope_section"] = [8, 12, 12]
    (directory / "config.json").write_text(json.dumps(config), encoding="utf-8")
    with pytest.raises(ConfigError, match="mrope_section"):
        Glm4vForConditionalGeneration.from_pretrained(directory)


@pytest.mark.parametrize("few", [0, 2])  # tokens of the single pass; before JAX 0.12, programs copy bfloat16 kernels
def test_what_does_not_fit_into_memory_is_refused_before_anything_is_read(checkpoints, monkeypatch, few):
    monkeypatch.setattr(cpu_matmul, "FEW_TOKENS", few)
    whole = sum(4 * tensor.size for tensor in random_tensors(CONFIG).values())
    free = [whole]
    monkeypatch.setattr(plan, "memory_of", lambda devices: [Memory("host memory", free[0])])
    model = load_model(checkpoints("base"), CONFIG, dtype="float32", stacked=False)
    assert device_bytes(jax.tree.leaves(model)) == whole
    free[0] -= 1
    with monkeypatch.context() as patch, pytest.raises(MemoryShortageError) as caught:
        patch.setattr(load, "array_of", lambda *_, **__: pytest.fail("a tensor was read"))
        load_runtime(checkpoints("base"), dtype="float32")
    size = f"{whole / 1000:.1f} kB"
    found = f"{checkpoints('base')}: needs {size} for weights in float32, found {size} free of host memory; what fits: "
    int8 = device_bytes(jax.tree.leaves(load_model(checkpoints("base"), CONFIG, quantize=QuantConfig(rest=True))))
    half = f"--dtype bfloat16 ({whole / 2000:.1f} kB) or " if few else ""
    fits = f"{found}{half}--quantize int8 ({int8 / 1000:.1f} kB)"
    assert str(caught.value) == f"{fits}; GLM4V_MEMORY_CHECK=0 loads all the same" and int8 < 0.3 * whole
    free[0] = whole // 2
    with pytest.raises(MemoryShortageError, match=r"needs .* for weights in bfloat16"):
        load_runtime(checkpoints("base"), dtype="bfloat16", reserve=1)


@pytest.mark.parametrize(
    ("options", "few", "expected"),
    [
        (dict(dtype="float32"), 0, []),
        (dict(quantize="int8"), 2, []),
        (dict(quantize="int8"), 0, ["slower on a CPU than with jax 0.12"]),
        (dict(dtype="bfloat16"), 0, ["slower on a CPU than with jax 0.12"]),
        (dict(quantize="int4"), 0, ["int4 by rounding costs quality", "slower on a CPU than with jax 0.12"]),
    ],
)
def test_what_costs_quality_or_speed_is_said(checkpoints, monkeypatch, options, few, expected):
    monkeypatch.setattr(cpu_matmul, "FEW_TOKENS", few)
    said = warnings_of(checkpoints("base"), **options)
    assert len(said) == len(expected) and all(part in line for part, line in zip(expected, said, strict=True)), said


def test_leaves_are_found_again_without_another_trace(monkeypatch):
    """And not those of another dtype, layout or scheme."""
    asked = [
        dict(dtype=jnp.float32, stacked=True), dict(dtype="bfloat16", stacked=True),
        dict(dtype=np.float32, stacked=False), dict(dtype="float32", stacked=True, quantize=QuantConfig("int8")),
    ]  # fmt: skip
    config = Glm4vConfig.from_dict(CONFIGS["base"])
    first = [plan.abstract_leaves(config, **options) for options in asked]
    assert len({str(leaves) for leaves, _ in first}) == len(asked)
    first[0][0].clear()  # the caller's own
    monkeypatch.setattr(plan.Glm4v, "zeros", None)
    again = [plan.abstract_leaves(CONFIG, **options) for options in asked]
    assert again[1:] == first[1:] and again[0][0].keys() == again[1][0].keys()
    with pytest.raises(TypeError, match="not callable"):
        plan.abstract_leaves(dataclasses.replace(config, image_token_id=7), **asked[0])


def test_int4_that_others_rounded_is_not_warned_of(checkpoints, monkeypatch):
    monkeypatch.setattr(cpu_matmul, "FEW_TOKENS", 2)
    monkeypatch.setattr(load, "stored_quantization", lambda _: StoredQuantization(4, 64))
    assert warnings_of(checkpoints("base"), quantize="int4") == []


def warnings_of(directory, **options):
    """What loading says, a line each."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        Glm4vForConditionalGeneration.from_pretrained(directory, **options)
    return [str(one.message) for one in caught if one.filename == __file__]


def test_devices_that_are_too_small_need_a_mesh(checkpoints, monkeypatch):
    monkeypatch.setattr(plan, "memory_of", lambda devices: [Memory("the memory of TPU v5e", 10_000)])
    for module in (load, plan):
        monkeypatch.setattr(module, "platform", lambda: "tpu")
    with pytest.raises(MemoryShortageError, match=r"what fits: --mesh with at least \d+ such devices; GLM4V_MEMORY"):
        load_model(checkpoints("base"), CONFIG, dtype="float32")


@pytest.mark.parametrize(("platform", "expected"), [("cpu", 16 + 8), ("gpu", 8 + 8), ("tpu", 8 + 8)])
def test_accelerators_have_two_int4_in_a_byte(monkeypatch, platform, expected):
    monkeypatch.setattr(plan, "platform", lambda: platform)
    leaves = [jax.ShapeDtypeStruct((8, 2), jnp.int4), jax.ShapeDtypeStruct((8,), jnp.int8)]
    assert device_bytes(leaves) == expected


@pytest.mark.usefixtures("mesh")
class TestReadingAhead:
    """`_ahead`, by which quantised kernels are read."""

    def test_results_come_in_order_two_ahead(self):
        started, may_end = [], {item: threading.Event() for item in "abcde"}

        def read(item):
            started.append(item)
            assert may_end[item].wait(30)
            return item.upper()

        may_end["b"].set()  # before the one that comes first
        results = load._ahead(read, "abcde")
        may_end["a"].set()
        assert next(results) == "A" and len(started) <= 3 and set(started) <= set("abc")
        for event in may_end.values():
            event.set()
        assert list(results) == list("BCDE") and not readers()

    def test_an_error_takes_the_place_of_its_result(self):
        def read(item):
            if item == "b":
                raise CheckpointError(f"{item}: found a fault")
            return item

        results = load._ahead(read, "abcdefgh")
        assert next(results) == "a"
        with pytest.raises(CheckpointError, match=r"^b: found a fault$"):
            next(results)
        assert next(results, None) is None and not readers()

    def test_what_is_not_wanted_any_more_is_not_read(self):
        done = []
        with contextlib.closing(load._ahead(lambda item: done.append(item) or item, itertools.count())) as results:
            assert next(results) == 0
        assert len(done) <= 3 and not readers()

    def test_a_load_that_fails_leaves_no_thread(self, checkpoints, tmp_path):
        quantize(checkpoints("base"), tmp_path / "int8")

        def stop(done, total):
            raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt) as raised:
            load_model(tmp_path / "int8", CONFIG, progress=stop)
        assert not readers() and raised.value is not None  # which keeps the frame


def readers():
    return [thread for thread in threading.enumerate() if thread.name.startswith(load._READER)]


def test_64_bits_are_refused(checkpoints):
    model = load_model(checkpoints("base"), CONFIG)
    jax.config.update("jax_enable_x64", True)
    try:
        for make in (lambda: Runtime.of(model), lambda: load_model(checkpoints("base"), CONFIG)):
            with pytest.raises(ConfigError, match=r"JAX: found 64 bits .*; expected 32"):
                make()
    finally:
        jax.config.update("jax_enable_x64", False)
