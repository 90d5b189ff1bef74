"""Every preset on eight devices computes what one device computes.

That is logits and loss, and what the preset is for: greedy tokens, or gradients. On meshes of several axes,
`tests/train/test_loop_on_meshes.py` and `tests/model/test_lora.py` take gradients, and
`tests/generate/test_engine_mesh.py` generates.
"""

import traceback

import pytest
from helpers_mesh import compare, compute, write_grouped

from glm4v_jax.planning.mesh_presets import PRESETS

# What the presets make of eight devices for this model, whose two key heads have four query heads each.
MESHES = {
    "latency": dict(data=1, fsdp=1, kv=2, q=4, seq=1),
    "throughput": dict(data=4, fsdp=1, kv=2, q=1, seq=1),
    "train": dict(data=1, fsdp=8, kv=1, q=1, seq=1),
    "long-context": dict(data=1, fsdp=1, kv=2, q=1, seq=4),
}


@pytest.fixture(scope="module")
def report(tmp_path_factory, run_on_devices):
    """Name of a mesh -> how it differs from one device."""
    directory = tmp_path_factory.mktemp("grouped")
    write_grouped(directory)
    return run_on_devices(compare_meshes, directory)


def test_every_preset_is_computed():
    assert set(PRESETS) == set(MESHES)


@pytest.mark.parametrize("name", MESHES)
def test_a_mesh_is_the_same_as_one_device(report, name):
    case = report[name]
    assert "error" not in case, case["error"]
    assert case["mesh"] == MESHES[name]
    assert case["logits"] <= 1e-5
    assert case["loss"] <= 1e-6
    if name == "train":
        assert case["gradients"] <= 1e-4, case["worst_gradient"]
    else:
        assert case["tokens_equal"]
    # Of the parameters; or the mesh would be one in name only.
    assert case["split"] > (0.9 if case["mesh"]["fsdp"] > 1 else 0.7)


def compare_meshes(directory):
    import jax

    from glm4v_jax import Glm4vConfig
    from glm4v_jax.devices.mesh import make_mesh
    from glm4v_jax.planning.mesh_presets import mesh_for

    config = Glm4vConfig.from_pretrained(directory)
    one, cases = compute(directory, make_mesh()), {}
    for name in MESHES:
        mesh = mesh_for(name, config, devices=jax.devices()[:8])
        assert mesh.size == 8
        cases[name] = {"mesh": dict(mesh.shape)}
        try:
            found = compute(directory, mesh, generates=name != "train", learns=name == "train")
            cases[name] |= compare(found, one)
        except Exception:  # or one mesh would hide what the others give
            cases[name]["error"] = traceback.format_exc()
    return cases
