"""Meshes by purpose: what each preset makes of how many devices, and what is refused."""

import math
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import jax
import pytest
from helpers_mesh import GROUPED

from glm4v_jax import Glm4v
from glm4v_jax.config.model import Glm4vConfig
from glm4v_jax.devices import mesh
from glm4v_jax.devices.hardware import GIB
from glm4v_jax.errors import ConfigError
from glm4v_jax.planning.mesh_presets import (
    PRESETS,
    check_text,
    mesh_for,
    parse_mesh,
    parse_preset,
    sizes_for,
)
from glm4v_jax.planning.parameter_layout import check_mesh, mesh_text, misfits, parameter_layout
from glm4v_jax.tiny import TINY_CHECKPOINT

RELEASED = Glm4vConfig.glm4_1v_9b()

# Of the 9B, written by hand. It has 2 key heads and 12 heads in the ViT, 16 query heads to a key head, MLPs of
# 13,696 = 128 x 107 and 4,096, and widths of 4,096 and 1,536 = 512 x 3.
LATENCY = {
    1: "data=1",
    2: "kv=2",
    3: "data=3",
    4: "kv=2,q=2",
    6: "data=3,kv=2",
    8: "kv=2,q=4",
    16: "kv=2,q=8",
    32: "kv=2,q=16",
    64: "data=2,kv=2,q=16",
    256: "data=8,kv=2,q=16",
}
LONG_CONTEXT = {
    1: "data=1",
    2: "kv=2",
    3: "data=3",
    4: "kv=2,seq=2",
    6: "data=3,kv=2",
    8: "kv=2,seq=4",
    16: "kv=2,seq=8",
    32: "kv=2,seq=16",
    64: "data=2,kv=2,seq=16",
    256: "data=8,kv=2,seq=16",
}
TRAIN = {
    1: "data=1",
    2: "fsdp=2",
    3: "data=3",
    4: "fsdp=4",
    6: "data=3,fsdp=2",
    8: "fsdp=8",
    16: "fsdp=16",
    32: "fsdp=32",
    64: "fsdp=64",
    256: "data=4,fsdp=64",
}
# 20.6 GB of weights in at most half of the memory; None is a CPU's.
THROUGHPUT = {
    None: {
        1: "data=1",
        2: "kv=2",
        3: "data=3",
        4: "data=2,kv=2",
        6: "data=3,kv=2",
        8: "data=4,kv=2",
        16: "data=8,kv=2",
        32: "data=16,kv=2",
        64: "data=32,kv=2",
        256: "data=128,kv=2",
    },
    16: {
        1: "data=1",
        2: "kv=2",
        3: "data=3",
        4: "kv=2,q=2",
        6: "data=3,kv=2",
        8: "data=2,kv=2,q=2",
        16: "data=4,kv=2,q=2",
        32: "data=8,kv=2,q=2",
        64: "data=16,kv=2,q=2",
        256: "data=64,kv=2,q=2",
    },
    32: {
        1: "data=1",
        2: "kv=2",
        3: "data=3",
        4: "data=2,kv=2",
        6: "data=3,kv=2",
        8: "data=4,kv=2",
        16: "data=8,kv=2",
        32: "data=16,kv=2",
        64: "data=32,kv=2",
        256: "data=128,kv=2",
    },
    80: {n: f"data={n}" for n in (1, 2, 3, 4, 6, 8, 16, 32, 64, 256)},
    95: {n: f"data={n}" for n in (1, 2, 3, 4, 6, 8, 16, 32, 64, 256)},
}
CASES = [
    *(("latency", None, n, text) for n, text in LATENCY.items()),
    *(("long-context", None, n, text) for n, text in LONG_CONTEXT.items()),
    *(("train", None, n, text) for n, text in TRAIN.items()),
    *(("throughput", gib, n, text) for gib, table in THROUGHPUT.items() for n, text in table.items()),
]


@pytest.mark.parametrize(("name", "gib", "number", "expected"), CASES)
def test_of_the_released_model(name, gib, number, expected):
    sizes = sizes_for(name, RELEASED, number, gib and gib * GIB)
    assert mesh_text(sizes) == expected
    assert tuple(sizes) == mesh.AXES and math.prod(sizes.values()) == number


@pytest.mark.parametrize("number", [1, 2, 5, 8, 12, 24, 48, 100, 1000])
@pytest.mark.parametrize("name", PRESETS)
@pytest.mark.parametrize("config", [RELEASED, Glm4vConfig.tiny(), Glm4vConfig.from_dict(GROUPED)])
def test_all_devices_are_used_and_everything_divides(config, name, number):
    for memory in (None, 2**20, 16 * GIB, 95 * GIB):
        sizes = sizes_for(name, config, number, memory)
        assert math.prod(sizes.values()) == number
        assert all(
            length % math.prod(sizes[axis] for axis in axes) == 0
            for leaf in parameter_layout(config)
            for length, axes in zip(leaf.shape, leaf.axes, strict=True)
        )


def test_a_number_of_devices_in_the_text():
    assert sizes_for("latency:8", RELEASED) == parse_mesh("kv=2,q=4")
    assert sizes_for(" latency : 4 ", RELEASED, 8) == parse_mesh("kv=2,q=2")
    assert sizes_for("train", RELEASED, 4) == parse_mesh("fsdp=4")
    assert sizes_for("fsdp=4,kv=2", RELEASED, 1) == parse_mesh("fsdp=4,kv=2")
    assert parse_preset("fsdp=4") is None and parse_preset("") is None
    assert parse_preset("train:16") == (PRESETS["train"], 16)


def test_presets_say_what_they_are_for():
    assert list(PRESETS) == ["latency", "throughput", "train", "long-context"]
    for name, preset in PRESETS.items():
        assert preset.name == name
        assert preset.description.endswith(".") and preset.description.count(". ") == 0


# Texts.


@pytest.mark.parametrize(
    ("text", "sizes"),
    [
        ("", (1, 1, 1, 1, 1)),
        ("q=2", (1, 1, 1, 2, 1)),
        ("data=2, fsdp=4,kv=2,q=8", (2, 4, 2, 8, 1)),
        ("kv=2,seq=8", (1, 1, 2, 1, 8)),
    ],
)
def test_axes(text, sizes):
    assert tuple(parse_mesh(text).values()) == sizes
    check_text(text)


@pytest.mark.parametrize("text", ["kv=99999999999999", "data=1024,fsdp=1025", "q=1048577"])
def test_axes_of_more_devices_than_there_are(text):
    with pytest.raises(ConfigError, match=r"mesh: found [\d,]+ devices in .* expected at most 1,048,576"):
        check_text(text)


@pytest.mark.parametrize(
    "text", ["tp=2", "fsdp=", "fsdp=0", "fsdp=-1", "fsdp=two", "kv=2,kv=2", "kv=2;q=2", "q=" + "9" * 5000]
)
def test_no_axes(text):
    with pytest.raises(ConfigError, match=r"mesh: found .* expected some of data, fsdp, kv, q, seq"):
        check_text(text)


@pytest.mark.parametrize("text", ["fast", "Latency", "fsdp", "latency,train", "long_context"])
def test_no_presets(text):
    known = "latency, throughput, train, long-context"
    with pytest.raises(ConfigError, match=f"mesh: found '{text}'; expected one of the presets {known}, or axes as in"):
        check_text(text)


@pytest.mark.parametrize("text", ["latency:", "latency:0", "latency:-1", "latency:x", "latency:2:2", "train:99999999"])
def test_no_number_of_devices(text):
    with pytest.raises(ConfigError, match=r"mesh: found '.*' devices in '.*'; expected a number above 0, as in"):
        check_text(text)


@pytest.mark.parametrize(("number", "found"), [(0, "0"), (-1, "-1"), (2**20 + 1, "1,048,577")])
def test_no_devices_for_a_preset(number, found):
    with pytest.raises(ConfigError, match=f"mesh train: found {found} devices; expected from 1 to 1,048,576"):
        sizes_for("train", RELEASED, number)
    with pytest.raises(ConfigError, match="mesh train: found no number of devices; expected one, as in train:8"):
        sizes_for("train", RELEASED)


def test_the_names_do_not_wait_for_jax():
    program = (
        "import sys\nfrom glm4v_jax.planning.mesh_presets import PRESETS, check_text\ncheck_text('latency')\n"
        "assert not {'jax', 'flax', 'numpy'} & sys.modules.keys()\n"
    )
    subprocess.run([sys.executable, "-c", program], cwd=TINY_CHECKPOINT.parents[2], check=True)


# What does not divide.


def test_all_that_does_not_divide_is_said_at_once():
    with pytest.raises(ConfigError) as caught:
        check_mesh(RELEASED, dict(data=1, fsdp=3, kv=5, q=3, seq=7))
    first, *others = str(caught.value).split("; ")
    assert first.startswith("mesh fsdp=3,kv=5,q=3,seq=7: ")
    assert {first.split(": ")[1], *others} == {
        "vocab of 151552 does not divide by mesh axes kv x q x seq of 105 devices",
        "embed of 4096 does not divide by mesh axes fsdp of 3 devices",  # and not 1,536
        "mlp of 4096 does not divide by mesh axes kv x q x seq of 105 devices",
        "mlp of 13696 does not divide by mesh axes kv x q x seq of 105 devices",
        "kv_heads of 2 does not divide by mesh axes kv of 5 devices",
        "q_groups of 16 does not divide by mesh axes q x seq of 21 devices",  # and not their 2,048 numbers
        "heads of 12 does not divide by mesh axes kv of 5 devices",
    }
    assert misfits(RELEASED, parse_mesh("data=7,fsdp=8,kv=2,q=4,seq=4")) == []


@pytest.mark.parametrize("text", ["kv=4", "q=32", "fsdp=1024", "kv=2,q=3", "seq=5"])
def test_what_is_refused_could_not_be_made(text):
    """The constructor of the model, in the mesh itself, comes to the same end: with the first thing that it meets."""
    sizes = parse_mesh(text)
    axes = jax.sharding.AbstractMesh(
        tuple(sizes.values()), mesh.AXES, axis_types=(jax.sharding.AxisType.Explicit,) * len(mesh.AXES)
    )

    def make():
        with jax.sharding.use_abstract_mesh(axes):
            jax.eval_shape(lambda: Glm4v.init(RELEASED))

    # In a thread of its own, where no mesh of another test is set.
    with ThreadPoolExecutor(1) as thread, pytest.raises(ConfigError) as made:
        thread.submit(make).result()
    with pytest.raises(ConfigError) as checked:
        sizes_for(text, RELEASED)
    assert str(made.value) in str(checked.value)


def test_a_tied_head_leaves_the_vocabulary_to_the_table():
    config = Glm4vConfig.tiny(tie_word_embeddings=True)
    assert sorted(misfits(config, parse_mesh("q=2,seq=7"))) == [
        "mlp of 64 does not divide by mesh axes kv x q x seq of 14 devices",
        "mlp of 96 does not divide by mesh axes kv x q x seq of 14 devices",
        "q_groups of 2 does not divide by mesh axes q x seq of 14 devices",
        "vocab of 320 does not divide by mesh axes kv x q x seq of 14 devices",
    ]


# Devices.


def test_a_mesh_of_the_devices_here():
    config = Glm4vConfig.tiny()
    for text in (*PRESETS, "data=1"):
        found = mesh_for(text, config, devices=jax.devices()[:1])
        assert dict(found.shape) == dict.fromkeys(mesh.AXES, 1)
        assert found.axis_types == (jax.sharding.AxisType.Explicit,) * len(mesh.AXES)
    with pytest.raises(ConfigError, match=r"mesh kv=2,q=1024: vocab of 320 does not divide"):
        mesh_for("kv=2,q=1024", config)
    with pytest.raises(ConfigError, match="mesh data=64 needs 64 devices, found 1"):
        mesh_for("data=64", config, devices=jax.devices()[:1])
    with pytest.raises(ConfigError, match="mesh train: found 0 devices"):
        mesh_for("train", config, devices=[])
