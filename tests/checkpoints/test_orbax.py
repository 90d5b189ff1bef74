"""Orbax checkpoints: what is written is what is read, in either layout and on any mesh, and damage is named."""

import json
import re
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
from helpers_checkpoints import RANDOM_CHECKPOINT
from helpers_orbax import assert_same_weights, contents
from orbax.checkpoint import v1 as ocp
from reference import CONFIGS, Prompts, export, random_tensors, write_checkpoint

from convert.to_hf import to_hf
from convert.to_orbax import to_orbax
from glm4v_jax import Engine, Glm4vForConditionalGeneration, Glm4vProcessor
from glm4v_jax.checkpoints.hf_write import tensor_shapes
from glm4v_jax.checkpoints.load import load_model
from glm4v_jax.checkpoints.orbax_read import open_weights
from glm4v_jax.checkpoints.orbax_write import save_model
from glm4v_jax.config.model import Glm4vConfig
from glm4v_jax.devices import mesh
from glm4v_jax.errors import CheckpointError
from glm4v_jax.files import asset_files, assets_directory, is_orbax
from glm4v_jax.model.params import leaf_paths

pytestmark = pytest.mark.slow

CONFIG = Glm4vConfig.from_dict(CONFIGS["base"])
MESHES = [dict(), dict(fsdp=2, kv=2, q=2), dict(data=2, fsdp=4)]
# Saved on, loaded on, whether stacked.
CASES = [(MESHES[0], MESHES[1], True), (MESHES[0], MESHES[1], False), (MESHES[1], MESHES[2], True),
         (MESHES[1], MESHES[0], False)]  # fmt: skip


@pytest.fixture(scope="module")
def saved(tmp_path_factory, checkpoints, mesh):
    """The base model as an Orbax checkpoint; not to be written to."""
    directory = tmp_path_factory.mktemp("saved") / "model"
    Glm4vForConditionalGeneration.from_pretrained(checkpoints("base")).save_orbax(directory)
    return directory


@pytest.fixture
def copy(saved, tmp_path):
    return Path(shutil.copytree(saved, tmp_path / "copy"))


@pytest.mark.parametrize("name", list(CONFIGS))
@pytest.mark.parametrize("stacked", [True, False])
def test_a_model_comes_back_bit_for_bit(name, stacked, checkpoints, tmp_path, mesh):
    config = Glm4vConfig.from_dict(CONFIGS[name])
    model = load_model(checkpoints(name), config, stacked=stacked)
    save_model(model, tmp_path / "saved")
    assert_same_weights_as_tensors(tmp_path / "saved", random_tensors(config))
    for layout in (True, False):
        again = load_model(tmp_path / "saved", config, stacked=layout)
        expected = model.stacked() if layout else model.unstacked()
        assert list(leaf_paths(again)) == list(leaf_paths(expected))
        jax.tree.map(np.testing.assert_array_equal, again, expected)


def assert_same_weights_as_tensors(directory, tensors):
    files = open_weights(directory)
    assert files.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert (files[name].shape, files[name].dtype, files[name].nbytes) == (tensor.shape, np.float32, tensor.nbytes)
        np.testing.assert_array_equal(files.read(name), tensor, name)


@pytest.mark.parametrize(
    "index", [np.s_[2:5], np.s_[-3:], np.s_[::7], np.s_[2:5, ...], np.s_[...], np.s_[1], np.s_[9:3]]
)
def test_slices_are_numpy_slices(saved, index):
    files = open_weights(saved)
    for name, tensor in random_tensors(CONFIG).items():
        np.testing.assert_array_equal(files.read(name, index), tensor[index], name)


def test_the_largest_tensors_are_read_by_slices(saved, monkeypatch):
    files = open_weights(saved)
    read = []
    whole = files.leaves.read
    monkeypatch.setattr(files.leaves, "read", lambda path, index: read.append(whole(path, index)) or read[-1])
    for name in ("lm_head.weight", "model.language_model.embed_tokens.weight"):
        files.read(name, slice(10, 20))
        assert read[-1].size == 10 * CONFIG.text_config.hidden_size


def test_orbax_alone_reads_it(saved):
    """As a nested dictionary with a leaf for each parameter of each layer."""
    with pytest.warns(UserWarning, match="Sharding info"):
        tree = ocp.load(saved)
    up = random_tensors(CONFIG)["model.visual.blocks.1.mlp.up_proj.weight"]
    np.testing.assert_array_equal(tree["visual"]["blocks"]["1"]["mlp"]["gate_up"]["kernel"][:, 1], up.T)
    versions = ocp.metadata(saved).custom_metadata["glm4v_jax"]["versions"]
    assert versions.keys() == {"glm4v_jax", "jax", "orbax-checkpoint"}


def test_relative_paths_work(copy, monkeypatch):
    monkeypatch.chdir(copy.parent)
    assert open_weights(copy.name).leaves.infos == open_weights(copy).leaves.infos


def test_missing_data_are_named_when_they_are_read(copy):
    for path in (copy / "state").rglob("d/*"):
        if path.stat().st_size > 100_000:
            path.unlink()
    files = open_weights(copy)
    assert len(files) == len(random_tensors(CONFIG))
    with pytest.raises(CheckpointError, match=r"copy: lm_head\.kernel: found unreadable data"):
        files.read("lm_head.weight")


def test_damaged_data_are_named(copy):
    path = max((copy / "state").rglob("d/*"), key=lambda path: path.stat().st_size)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 3])
    with pytest.raises(CheckpointError, match=r"copy: [\w.]+: found unreadable data"):
        Glm4vForConditionalGeneration.from_pretrained(copy)


@pytest.mark.parametrize("name", ["_METADATA", "manifest.ocdbt"])
def test_damaged_metadata_are_named(copy, name):
    (copy / "state" / name).write_bytes(b"{nonsense")
    with pytest.raises(CheckpointError, match="copy"):
        Glm4vForConditionalGeneration.from_pretrained(copy)


def test_leaves_that_do_not_fit_are_listed_together(copy):
    text = dict(CONFIGS["base"]["text_config"], vocab_size=384)
    (copy / "assets" / "config.json").write_text(json.dumps(CONFIGS["base"] | {"text_config": text}))
    with pytest.raises(CheckpointError) as caught:
        open_weights(copy)
    for part in (
        "embed_tokens.embedding: found shape [320, 64]; expected [384, 64]",
        "lm_head.kernel: found shape [64, 320]; expected [64, 384]",
    ):
        assert part in str(caught.value)


@pytest.mark.parametrize("layers", [1, 3])
def test_another_number_of_layers_is_named(copy, layers):
    text = CONFIG.text_config.to_dict() | {"num_hidden_layers": layers}
    (copy / "assets" / "config.json").write_text(json.dumps(CONFIGS["base"] | {"text_config": text}))
    message = rf"text_config.num_hidden_layers: found {layers}; expected 2: the tensors are of 2 layers"
    with pytest.raises(CheckpointError, match=message):
        open_weights(copy)


def test_a_model_of_another_configuration_is_refused(saved, mesh):
    with pytest.raises(CheckpointError, match=r"vision_config.depth: found 3; expected 2"):
        load_model(saved, Glm4vConfig.from_dict(CONFIGS["wide"]))


def test_a_newer_format_is_refused(copy):
    path = copy / "_CHECKPOINT_METADATA"
    content = json.loads(path.read_text())
    content["custom_metadata"]["glm4v_jax"]["format"] = 2
    path.write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match=r"found format 2; expected 1"):
        open_weights(copy)


@pytest.fixture
def changed(checkpoints, tmp_path):
    """A function: change the provenance of a converted checkpoint, and open it."""
    from convert.to_orbax import to_orbax

    to_orbax(checkpoints("base"), tmp_path / "changed")
    path = tmp_path / "changed" / "_CHECKPOINT_METADATA"

    def open_changed(change):
        content = json.loads(path.read_text())
        change(content["custom_metadata"]["glm4v_jax"])
        path.write_text(json.dumps(content))
        return open_weights(tmp_path / "changed")

    return open_changed


NAMED = "model.language_model.norm.weight"
MALFORMED = "tensors: found .*; expected name, dtype \\(float32, .*, int64\\) and file of a tensor"


@pytest.mark.parametrize(
    ("entry", "faults"),
    [
        (["model.language_model.morn.weight", "float32", ""],
         ["model.language_model.morn.weight: found .*; expected no such", "language_model.norm.weight: found nothing"]),
        (["lm_head.weight", "float32", ""],
         ["lm_head.weight: found besides lm_head.weight; expected one", "language_model.norm.weight: found nothing"]),
        ([NAMED, "float33", ""], [MALFORMED]),
        ([NAMED, None, ""], [MALFORMED]),
        ([NAMED], [MALFORMED]),
    ],
)  # fmt: skip
def test_provenance_with_other_tensors_is_refused(changed, entry, faults):
    def change(provenance):
        (place,) = (i for i, (name, *_) in enumerate(provenance["tensors"]) if name == NAMED)
        provenance["tensors"][place] = entry

    with pytest.raises(CheckpointError, match="changed: glm4v_jax: ") as caught:
        changed(change)
    assert all(re.search(fault, str(caught.value)) for fault in faults), caught.value


@pytest.mark.parametrize(
    ("key", "value"), [("metadata", "pt"), ("source", []), ("tensors", "all"), ("tensors", {"a": 1})]
)
def test_malformed_provenance_is_refused(changed, key, value):
    with pytest.raises(CheckpointError, match=f"{key}: found .*; expected"):
        changed(lambda provenance: provenance.update({key: value}))


def test_tensors_come_in_the_order_that_exporting_has(saved):
    """Where they never were in safetensors."""
    assert list(open_weights(saved)) == list(tensor_shapes(CONFIG))


def test_the_name_of_an_unfinished_conversion_is_refused(copy):
    copy.rename(copy.parent / ".x.unfinished")
    with pytest.raises(CheckpointError, match=r"\.x\.unfinished: found an unfinished conversion"):
        Glm4vForConditionalGeneration.from_pretrained(copy.parent / ".x.unfinished")


def test_a_checkpoint_may_be_called_unfinished(copy, saved):
    copy.rename(copy.parent / "x.unfinished")
    assert len(open_weights(copy.parent / "x.unfinished")) == len(open_weights(saved))


def test_a_checkpoint_that_orbax_has_not_finished_is_refused(copy):
    copy.rename(copy.parent / "x.partial_save")
    with pytest.raises(CheckpointError, match="unfinished Orbax"):
        open_weights(copy.parent / "x.partial_save")


def test_a_checkpoint_without_state_is_refused(copy):
    shutil.rmtree(copy / "state")
    with pytest.raises(CheckpointError, match="unfinished Orbax"):
        open_weights(copy)


def test_a_checkpoint_is_kept_unless_overwrite_is_given(copy, ours):
    before = contents(copy)
    with pytest.raises(CheckpointError, match="found a checkpoint; expected nothing"):
        ours("tester").save_orbax(copy)
    assert contents(copy) == before
    ours("tester").save_orbax(copy, overwrite=True)
    assert Glm4vConfig.from_pretrained(copy) == Glm4vConfig.from_dict(CONFIGS["tester"])
    assert [path.name for path in copy.parent.iterdir()] == ["copy"]


@pytest.fixture(scope="module")
def with_assets(tmp_path_factory, mesh):
    """The random checkpoint's model, and its directory in Orbax format."""
    directory = tmp_path_factory.mktemp("with_assets") / "model"
    model = Glm4vForConditionalGeneration.from_pretrained(RANDOM_CHECKPOINT)
    model.save_orbax(directory, assets=RANDOM_CHECKPOINT)
    return model, directory


def test_files_beside_the_weights_are_copied(with_assets):
    _, directory = with_assets
    assert is_orbax(directory) and not is_orbax(RANDOM_CHECKPOINT)
    assert assets_directory(RANDOM_CHECKPOINT) == Path(RANDOM_CHECKPOINT)
    assert {path.name for path in asset_files(RANDOM_CHECKPOINT)} >= {"tokenizer.json", "chat_template.jinja"}
    assert asset_files(directory) == asset_files(RANDOM_CHECKPOINT)


def test_the_processor_of_an_orbax_checkpoint_is_that_of_its_source(with_assets):
    messages = [{"role": "user", "content": [{"type": "text", "text": "Hello"}]}]
    expected, found = (
        Glm4vProcessor.from_pretrained(directory).apply_chat_template(messages, add_generation_prompt=True)
        for directory in (RANDOM_CHECKPOINT, with_assets[1])
    )
    assert found == expected


def test_an_engine_loads_an_orbax_checkpoint(with_assets):
    model, directory = with_assets
    engine = Engine.from_pretrained(directory / "assets")
    assert engine.model.generation_config == model.generation_config
    jax.tree.map(np.testing.assert_array_equal, engine.model.module, model.module)


def test_auto_is_the_dtype_on_disk(saved, tmp_path, mesh):
    model = load_model(saved, CONFIG, dtype="bfloat16")
    save_model(model, tmp_path / "half")
    assert Glm4vForConditionalGeneration.from_pretrained(tmp_path / "half", dtype="auto").dtype == jax.numpy.bfloat16
    widened = load_model(tmp_path / "half", CONFIG)
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a, np.asarray(b, np.float32)), widened, model.stacked())


def test_saved_on_one_mesh_loaded_on_another(tmp_path, run_on_devices):
    report = run_on_devices(save_and_load, tmp_path)
    assert len(report) == len(CASES)
    for case in report:
        assert case["bits"], case
        assert case["split"] > 0.9 or not case["loaded"], case  # or the meshes would be the same in all but name
    # The same program on the same weights: nothing is left to rounding.
    assert [case["logits_equal"] for case in report] == [True, True, None, None]


def save_and_load(directory):
    jax.clear_caches()  # or what others have compiled would not be listed
    lowered = set()
    jax.monitoring.register_event_duration_secs_listener(lambda _, __, **details: lowered.add(details.get("fun_name")))
    write_checkpoint("base", directory)
    tensors, report = random_tensors(CONFIG), []
    prompts = Prompts(CONFIG, [[2, ("image", (4, 6)), 3], [9]], seed=2)
    for i, (sizes, loaded, stacked) in enumerate(CASES):
        saved = directory / str(MESHES.index(sizes))
        load = Glm4vForConditionalGeneration.from_pretrained
        if not saved.exists():
            load(directory, mesh=mesh.make_mesh(**sizes), stacked=bool(sizes)).save_orbax(saved)
            assert_same_weights(saved, directory / "0")
        model = load(saved, mesh=mesh.make_mesh(**loaded), stacked=stacked)
        leaves, exported = jax.tree.leaves(model.module), export(model.module, CONFIG)
        split = sum(x.size for x in leaves if x.addressable_shards[0].data.size < x.size)
        equal = None
        if i < 2:
            expected = load(directory, mesh=mesh.make_mesh(**loaded), stacked=stacked)(**prompts.inputs).logits
            equal = bool(np.array_equal(model(**prompts.inputs).logits, expected))
        report.append(
            dict(
                loaded=loaded, split=split / sum(x.size for x in leaves), logits_equal=equal,
                bits=all(np.array_equal(exported[name], tensor) for name, tensor in tensors.items()),
            )
        )  # fmt: skip
    from tests.checkpoints.test_family import write

    source = write(directory / "ocr", "bfloat16")
    for i, sizes in enumerate([dict(kv=2, q=2, fsdp=2), dict(data=2, kv=2, seq=2)]):
        to_orbax(source, directory / f"ocr-{i}", mesh=mesh.make_mesh(**sizes))
        to_hf(directory / f"ocr-{i}", directory / f"ocr-{i}-back", max_shard_size="original")
        back, original = (path / "model.safetensors" for path in (directory / f"ocr-{i}-back", source))
        assert back.read_bytes() == original.read_bytes(), sizes
    assert "jit(forward)" in lowered and "jit(slice)" not in lowered  # small leaves are written without compiling
    return report
