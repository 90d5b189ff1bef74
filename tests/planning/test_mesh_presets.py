"""Presets and axes of meshes: what they give for which number of devices, and what is refused."""

import math
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import jax
import pytest
from helpers_mesh import GROUPED

from glm4v_jax import Glm4v
from glm4v_jax.config.members import MEMBERS
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
from glm4v_jax.planning.parameter_layout import check_mesh, mesh_text, misfits
from glm4v_jax.tiny import TINY_CHECKPOINT

RELEASED = Glm4vConfig.glm4_1v_9b()

# Of the 9B, written by hand. It has 2 key heads and 12 heads in the ViT, 16 query heads per key head, MLPs of
# 13,696 = 128 x 107 and 4,096, and widths of 4,096 and 1,536 = 512 x 3.
LATENCY = {1: "data=1", 2: "kv=2", 3: "data=3", 6: "data=3,kv=2", 8: "kv=2,q=4", 64: "data=2,kv=2,q=16"}
LONG_CONTEXT = {1: "data=1", 2: "kv=2", 3: "data=3", 6: "data=3,kv=2", 8: "kv=2,seq=4", 64: "data=2,kv=2,seq=16"}
TRAIN = {1: "data=1", 3: "data=3", 6: "data=3,fsdp=2", 8: "fsdp=8", 64: "fsdp=64", 256: "data=4,fsdp=64"}
# 20.6 GB of weights in at most half of the memory in GiB; None is a CPU's.
THROUGHPUT = {
    None: {1: "data=1", 2: "kv=2", 3: "data=3", 6: "data=3,kv=2", 8: "data=4,kv=2"},
    16: {1: "data=1", 2: "kv=2", 3: "data=3", 4: "kv=2,q=2", 6: "data=3,kv=2", 256: "data=64,kv=2,q=2"},
    32: {1: "data=1", 2: "kv=2", 3: "data=3", 4: "data=2,kv=2", 6: "data=3,kv=2", 256: "data=128,kv=2"},
    80: {1: "data=1", 3: "data=3", 8: "data=8"},
}
CASES = [
    *(("latency", None, n, text) for n, text in LATENCY.items()),
    *(("long-context", None, n, text) for n, text in LONG_CONTEXT.items()),
    *(("train", None, n, text) for n, text in TRAIN.items()),
    *(("throughput", gib, n, text) for gib, table in THROUGHPUT.items() for n, text in table.items()),
]


@pytest.mark.parametrize(("name", "gib", "number", "expected"), CASES)
def test_a_preset_shares_out_devices_for_the_released_model(name, gib, number, expected):
    sizes = sizes_for(name, RELEASED, number, gib and gib * GIB)
    assert mesh_text(sizes) == expected
    assert tuple(sizes) == mesh.AXES


@pytest.mark.parametrize(
    ("name", "number", "expected"),
    [("latency", 8, "kv=8"), ("latency", 32, "data=2,kv=8,q=2"), ("long-context", 16, "kv=8,seq=2")],
)
def test_a_preset_uses_the_key_heads_of_glm_ocr(name, number, expected):
    assert mesh_text(sizes_for(name, MEMBERS["GLM-OCR"].config(), number)) == expected


@pytest.mark.parametrize(
    ("name", "gib", "scheme", "expected"),
    [
        ("throughput", 24, "none", "data=4,kv=2"),
        ("throughput", 24, "int8", "data=8"),
        ("latency", None, "int8", "kv=2,q=4"),
        ("latency", None, "int4", "data=4,kv=2"),  # 13,696 = 64 x 214 inputs in groups of 64
    ],
)
def test_a_preset_knows_how_weights_are_quantised(name, gib, scheme, expected):
    assert mesh_text(sizes_for(name, RELEASED, 8, gib and gib * GIB, scheme=scheme)) == expected


@pytest.mark.parametrize("memory", [None, 2**20, 16 * GIB, 95 * GIB])
@pytest.mark.parametrize("name", PRESETS)
@pytest.mark.parametrize("config", [RELEASED, Glm4vConfig.tiny(), Glm4vConfig.from_dict(GROUPED)])
def test_a_preset_uses_all_devices_and_divides(config, name, memory):
    for number in (1, 2, 5, 8, 12, 24, 48, 100, 1000):
        sizes = sizes_for(name, config, number, memory)
        assert math.prod(sizes.values()) == number
        assert not misfits(config, sizes)


def test_a_text_may_have_the_number_of_devices():
    assert sizes_for("latency:8", RELEASED) == parse_mesh("kv=2,q=4")
    assert sizes_for(" latency : 4 ", RELEASED, 8) == parse_mesh("kv=2,q=2")
    assert sizes_for("train", RELEASED, 4) == parse_mesh("fsdp=4")
    assert sizes_for("fsdp=4,kv=2", RELEASED, 1) == parse_mesh("fsdp=4,kv=2")
    assert parse_preset("fsdp=4") is None and parse_preset("") is None
    assert parse_preset("train:16") == (PRESETS["train"], 16)


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
def test_axes_are_parsed(text, sizes):
    assert tuple(parse_mesh(text).values()) == sizes
    check_text(text)


@pytest.mark.parametrize("text", ["kv=99999999999999", "data=1024,fsdp=1025", "q=1048577"])
def test_too_many_devices_are_refused(text):
    with pytest.raises(ConfigError, match=r"mesh: found [\d,]+ devices in .* expected at most 1,048,576"):
        check_text(text)


@pytest.mark.parametrize(
    "text", ["tp=2", "fsdp=", "fsdp=0", "fsdp=-1", "fsdp=two", "kv=2,kv=2", "kv=2;q=2", "q=" + "9" * 5000]
)
def test_invalid_axes_are_refused(text):
    with pytest.raises(ConfigError, match=r"mesh: found .* expected some of data, fsdp, kv, q, seq"):
        check_text(text)


@pytest.mark.parametrize("text", ["fast", "Latency", "fsdp", "latency,train", "long_context"])
def test_unknown_presets_are_refused(text):
    known = "latency, throughput, train, long-context"
    with pytest.raises(ConfigError, match=f"mesh: found '{text}'; expected one of the presets {known}, or axes as in"):
        check_text(text)


@pytest.mark.parametrize("text", ["latency:", "latency:0", "latency:-1", "latency:x", "latency:2:2", "train:99999999"])
def test_invalid_numbers_of_devices_are_refused(text):
    with pytest.raises(ConfigError, match=r"mesh: found '.*' devices in '.*'; expected a number above 0, as in"):
        check_text(text)


@pytest.mark.parametrize(("number", "found"), [(0, "0"), (-1, "-1"), (2**20 + 1, "1,048,577")])
def test_a_preset_needs_a_valid_number_of_devices(number, found):
    with pytest.raises(ConfigError, match=f"mesh train: found {found} devices; expected from 1 to 1,048,576"):
        sizes_for("train", RELEASED, number)
    with pytest.raises(ConfigError, match="mesh train: found no number of devices; expected one, as in train:8"):
        sizes_for("train", RELEASED)


def test_texts_are_checked_without_jax():
    program = (
        "import sys\nfrom glm4v_jax.planning.mesh_presets import PRESETS, check_text\ncheck_text('latency')\n"
        "assert not {'jax', 'flax', 'numpy'} & sys.modules.keys()\n"
    )
    subprocess.run([sys.executable, "-c", program], cwd=TINY_CHECKPOINT.parents[2], check=True)


# What is not divisible.


def test_all_dimensions_that_do_not_divide_are_named():
    with pytest.raises(ConfigError) as caught:
        check_mesh(RELEASED, dict(data=1, fsdp=3, kv=5, q=3, seq=7))
    first, *others = str(caught.value).split("; ")
    assert first.startswith("mesh fsdp=3,kv=5,q=3,seq=7: ")
    assert {first.split(": ")[1], *others} == {
        "vocab of 151552 is not divisible by mesh axes kv x q x seq of 105 devices",
        "embed of 4096 is not divisible by mesh axes fsdp of 3 devices",  # and not 1,536
        "mlp of 4096 is not divisible by mesh axes kv x q x seq of 105 devices",
        "mlp of 13696 is not divisible by mesh axes kv x q x seq of 105 devices",
        "kv_heads of 2 is not divisible by mesh axes kv of 5 devices",
        "q_groups of 16 is not divisible by mesh axes q x seq of 21 devices",  # and not their 2,048 numbers
        "heads of 12 is not divisible by mesh axes kv of 5 devices",
    }
    assert misfits(RELEASED, parse_mesh("data=7,fsdp=8,kv=2,q=4,seq=4")) == []


@pytest.mark.parametrize("text", ["kv=4", "q=32", "fsdp=1024", "kv=2,q=3", "seq=5"])
def test_a_mesh_is_refused_if_the_model_cannot_be_made_on_it(text):
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


def test_with_a_tied_head_the_vocabulary_is_the_tables():
    config = Glm4vConfig.tiny(tie_word_embeddings=True)
    assert sorted(misfits(config, parse_mesh("q=2,seq=7"))) == [
        "mlp of 64 is not divisible by mesh axes kv x q x seq of 14 devices",
        "mlp of 96 is not divisible by mesh axes kv x q x seq of 14 devices",
        "q_groups of 2 is not divisible by mesh axes q x seq of 14 devices",
        "vocab of 320 is not divisible by mesh axes kv x q x seq of 14 devices",
    ]


# Devices.


@pytest.mark.parametrize("text", [*PRESETS, "data=1"])
def test_a_mesh_of_one_device(text):
    found = mesh_for(text, Glm4vConfig.tiny(), devices=jax.devices()[:1])
    assert dict(found.shape) == dict.fromkeys(mesh.AXES, 1)
    assert found.axis_types == (jax.sharding.AxisType.Explicit,) * len(mesh.AXES)


@pytest.mark.parametrize(
    ("text", "number", "message"),
    [
        ("kv=2,q=1024", 1, "mesh kv=2,q=1024: vocab of 320 is not divisible"),
        ("data=64", 1, "mesh data=64 needs 64 devices, found 1"),
        ("train", 0, "mesh train: found 0 devices"),
    ],
)
def test_a_mesh_that_the_devices_cannot_make_is_refused(text, number, message):
    with pytest.raises(ConfigError, match=message):
        mesh_for(text, Glm4vConfig.tiny(), devices=jax.devices()[:number])
