"""Rules for meshes that others make, and models loaded onto them."""

import concurrent.futures

import jax
import numpy as np
import pytest
from helpers_lora import trained
from helpers_mesh import ROWS, write_grouped
from jax.sharding import AbstractMesh, AxisType
from reference import Prompts

from glm4v_jax import Glm4vForConditionalGeneration
from glm4v_jax.checkpoints.adapter import save_adapter
from glm4v_jax.checkpoints.load import load_runtime
from glm4v_jax.config.model import Glm4vConfig
from glm4v_jax.devices import mesh
from glm4v_jax.errors import ConfigError
from glm4v_jax.model.rules import rules_for
from glm4v_jax.planning.parameter_layout import misfits, parameter_layout

VLLM_AXES = ("data", "attn_dp", "attn_dp_expert", "expert", "model", "dcp", "pcp")
"""Of tpu-inference 0.32.0's larger mesh."""


@pytest.mark.parametrize("devices", [1, 2, 3, 8, 16, 64])
def test_a_model_is_sharded_as_far_as_it_divides(devices):
    config = Glm4vConfig.glm4_1v_9b()
    rules = rules_for(config, AbstractMesh((2, 1, 1, 1, devices, 1, 1), VLLM_AXES))
    assert rules.axes == ("model",) and rules["batch"] is rules["embed"] is None
    assert (rules["kv_heads"], rules["q_groups"]) == {2: ("model", None), 1: ("model", None)}.get(
        devices, (None, "model" if devices in (8, 16) else None)
    )
    assert (rules["mlp"], rules["vocab"]) == (("model",) * 2 if 13696 % devices == 0 else (None, None))
    assert {rules["heads"], rules["patches"]} == {"model", None}
    sizes = dict.fromkeys(mesh.AXES, 1) | {"model": devices}
    with mesh.use_rules(rules):
        assert misfits(config, sizes) == []
        layout = parameter_layout(config)
    split = sum(leaf.parameters for leaf in layout if leaf.shards(sizes) == devices)
    assert split / sum(leaf.parameters for leaf in layout) > (0.96 if devices in (1, 2, 8, 16) else 0)


def test_a_mesh_without_the_axis_is_refused():
    with pytest.raises(ConfigError, match=r"mesh: found .*'x'.*; expected 'model' among its axes, or rules for them"):
        rules_for(Glm4vConfig.tiny(), AbstractMesh((2,), ("x",)))
    assert rules_for(Glm4vConfig.tiny(), mesh.make_mesh()) is mesh.RULES


@pytest.fixture(scope="module")
def report(tmp_path_factory, run_on_devices):
    """Of up to four devices."""
    directory = tmp_path_factory.mktemp("rules")
    write_grouped(directory)
    return run_on_devices(compare_loaded, directory)


def test_logits_are_those_of_one_device(report):
    assert list(report["logits"]) == ["Auto, 2 devices", "Explicit, 2 devices", "Auto, 4 devices"]
    assert max(report["logits"].values()) <= 1e-5
    assert min(report["split"].values()) > 0.7  # or the meshes would be the same in all but name


@pytest.mark.parametrize("name", ["orbax", "int8", "adapter"])
def test_weights_are_those_of_one_device(report, name):
    assert report["weights"][name] == {"equal": True, "mesh": True}


def test_nothing_is_copied_from_mesh_to_mesh(report):
    assert report["pointers"]


def made(types, devices, axes=("data", "model")):
    sizes = [devices if axis == "model" else 1 for axis in axes]
    return jax.make_mesh(sizes, axes, axis_types=(types,) * len(axes), devices=jax.devices()[:devices])


def logits_of(runtime):
    model = Glm4vForConditionalGeneration(runtime.config, runtime=runtime)
    prompts = Prompts(runtime.config, ROWS, padding="right", seed=1)
    return np.asarray(model(**prompts.inputs).logits)[prompts.real]


def split(runtime):
    """Share of parameters that are split."""
    leaves = jax.tree.leaves(runtime.module)
    whole = sum(x.size for x in leaves)
    return sum(x.size for x in leaves if x.addressable_shards[0].data.size < x.size) / whole


def pointers(module):
    shards = [shard.data for x in jax.tree.leaves(module) for shard in x.addressable_shards]
    return [shard.unsafe_buffer_pointer() for shard in shards]


def compare_loaded(directory):
    one, thread = load_runtime(directory, stacked=True), concurrent.futures.ThreadPoolExecutor(1)
    expected, report = logits_of(one), {"logits": {}, "split": {}, "weights": {}}
    for types, devices in ((AxisType.Auto, 2), (AxisType.Explicit, 2), (AxisType.Auto, 4)):
        found = load_runtime(directory, mesh=made(types, devices), stacked=True)
        name = f"{types.name}, {devices} devices"
        logits = thread.submit(logits_of, found).result()  # where neither mesh nor rules are set
        report["logits"][name] = float(np.abs(logits - expected).max() / np.abs(expected).max())
        report["split"][name] = split(found)
    twin = mesh.placed_on(found.module, mesh.explicit(found.mesh))
    report["pointers"] = pointers(twin) == pointers(found.module)

    Glm4vForConditionalGeneration(found.config, runtime=found).save_orbax(directory / "orbax")
    save_adapter(trained(one.module), directory / "adapter")
    ways = {"orbax": (directory / "orbax", {}), "int8": (directory, dict(quantize="int8")),
            "adapter": (directory, dict(adapter=directory / "adapter"))}  # fmt: skip
    for name, (source, options) in ways.items():
        on_one, found = (load_runtime(source, mesh=m, **options) for m in (None, made(AxisType.Auto, 2, VLLM_AXES)))
        pairs = zip(*(jax.tree.leaves(runtime.module) for runtime in (on_one, found)), strict=True)
        report["weights"][name] = {
            "equal": all(np.array_equal(a, b) for a, b in pairs),
            "mesh": {x.sharding.mesh for x in jax.tree.leaves(found.module)} == {found.mesh},
        }
    return report
