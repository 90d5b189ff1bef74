"""One device and many: the same results of calls on any mesh."""

import concurrent.futures

import jax
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from glm4v_jax import Glm4v, Glm4vConfig
from glm4v_jax.devices import mesh
from glm4v_jax.errors import ConfigError

CALLS = [dict(data=2), dict(fsdp=2, kv=2, q=2), dict(kv=2, seq=2)]
"""Meshes; their data axes, where there are some, divide neither of the batches of three rows and of one."""


def test_logical_names_become_mesh_axes():
    assert mesh.spec("batch", "length", "kv_heads", "q_groups", None) == P(
        ("data", "fsdp"), None, "kv", ("q", "seq"), None
    )
    assert mesh.spec("embed", "mlp") == P("fsdp", ("kv", "q", "seq"))
    assert mesh.gathered("embed", "mlp") == P(None, ("kv", "q", "seq"))
    with pytest.raises(KeyError):
        mesh.spec("nonsense")


def test_too_few_devices_are_refused():
    needed = 2 * len(jax.devices())
    with pytest.raises(ConfigError, match=f"data={needed} needs {needed} devices, found {len(jax.devices())}"):
        mesh.make_mesh(data=needed)


def test_the_current_mesh_is_kept():
    with mesh.use_mesh() as outer, mesh.use_mesh() as inner:
        assert inner == outer and mesh.data_shards() == 1
        assert inner.axis_names == mesh.AXES


def test_a_reshaped_mesh_keeps_the_order_of_its_devices():
    """Or a program with arrays of both is refused: `make_mesh` orders a v5p:2x2x1 anew for kv=2 q=2 after fsdp=4."""
    made = mesh.make_mesh(devices=jax.devices()[:1])
    assert list(mesh.reshaped(made, {"kv": 1}).devices.flat) == list(made.devices.flat)
    with pytest.raises(ConfigError, match="mesh kv=2: found 1 device in the other mesh; expected 2, the same devices"):
        mesh.reshaped(made, {"kv": 2})


def test_a_program_is_compiled_for_each_table_of_rules():
    devices = jax.make_mesh((1, 1), ("data", "model"), axis_types=(AxisType.Explicit,) * 2, devices=jax.devices()[:1])
    traced = []

    @jax.jit
    def place(x):
        traced.append(mesh.current_rules())
        return mesh.reshard(x, "heads", "embed")

    def spec(rules):
        with mesh.use_mesh(devices, rules):
            return place(np.ones((2, 2))).sharding.spec

    heads, embed = mesh.Rules(heads="model"), mesh.Rules(embed=("data", "model"))
    expected = {heads: P("model", None), embed: P(None, ("data", "model")), mesh.REPLICATED: P(None, None)}
    with concurrent.futures.ThreadPoolExecutor(3) as threads:
        assert [*map(spec, expected), *threads.map(spec, expected)] == [*expected.values()] * 2
        assert traced == list(expected)
        with mesh.use_rules(heads):
            assert mesh.current_rules() == mesh.Rules(heads="model") != mesh.RULES
            assert threads.submit(mesh.current_rules).result() is mesh.RULES
    assert mesh.current_rules() is mesh.RULES


def test_rules_name_explicit_axes_of_the_mesh():
    shared = mesh.Rules(heads="model", batch=("data", "model"))
    assert shared.axes == ("data", "model") and hash(shared) == hash(mesh.Rules(**dict(list(shared.items())[1:])))
    with pytest.raises(ConfigError, match="rules: found 'head'; expected some of batch, rows,"):
        mesh.Rules(head="model")
    with pytest.raises(ConfigError, match="rules: found mesh axes model; expected Explicit ones of the mesh"):
        mesh.use_mesh(mesh.make_mesh(), shared).__enter__()
    auto = jax.make_mesh((1, 1), ("data", "model"), axis_types=(AxisType.Auto,) * 2, devices=jax.devices()[:1])
    with pytest.raises(ConfigError, match="rules: found mesh axes data, model; expected Explicit"):
        mesh.use_mesh(auto, shared).__enter__()
    with mesh.use_mesh(auto, mesh.REPLICATED):
        assert mesh.data_shards() == 1


def test_calls_are_the_same_on_every_mesh(run_on_devices, checkpoints):
    cases = run_on_devices(compare_calls, checkpoints("base"))
    assert [case["mesh"] for case in cases] == CALLS
    for case in cases:
        assert case["names"] == ["loss", "logits", "step", "embedded", *["hidden state"] * 3]
        assert np.max(case["differences"]) <= 1e-5, case


def test_a_mesh_that_key_heads_do_not_divide_by_is_refused(run_on_devices):
    assert run_on_devices(released_model_on_meshes) == "kv_heads of 2 is not divisible by mesh axes kv of 4 devices"


def parts_of_calls(model):
    """Name -> what calls return, without padding: of prompts, a step after them, embeddings in place of tokens."""
    from reference import Prompts

    prompts = Prompts(model.config, [[2, ("image", (4, 6)), 3], [9], [("video", (2, 2, 4)), 1]], seed=2)
    inputs, real = prompts.inputs, prompts.real
    labels = np.where(real & (prompts.input_ids < 300), prompts.input_ids, -100)
    out = model(**inputs, labels=labels, output_hidden_states=True)
    mask = np.pad(inputs["attention_mask"], ((0, 0), (0, 1)), constant_values=1)
    step = model(np.full((3, 1), 7), attention_mask=mask, past_key_values=out.past_key_values)
    # Images and videos together need tokens to distinguish them.
    images = {name: value for name, value in inputs.items() if "video" not in name and name != "input_ids"}
    ids, mask = prompts.input_ids[:1], inputs["attention_mask"][:1]
    positions, _ = model.model.get_rope_index(ids, inputs["image_grid_thw"], attention_mask=mask)
    embeds = model.model.get_input_embeddings(ids)
    images |= dict(attention_mask=mask, position_ids=positions, inputs_embeds=embeds)
    embedded = model(**images)
    return [
        ("loss", np.asarray(out.loss)), ("logits", np.asarray(out.logits)[real]), ("step", np.asarray(step.logits)),
        ("embedded", np.asarray(embedded.logits)[real[:1]]),
        *(("hidden state", np.asarray(x)[real]) for x in out.hidden_states),
    ]  # fmt: skip


def compare_calls(directory):
    """Differences of `parts_of_calls` from one device's, relative to the largest magnitude."""
    from glm4v_jax import Glm4vForConditionalGeneration

    def on(sizes):
        # As on every platform but a CPU; `test_distributed.py` has layers one by one on a mesh.
        made = mesh.make_mesh(**sizes)
        return parts_of_calls(Glm4vForConditionalGeneration.from_pretrained(directory, mesh=made, stacked=True))

    expected, report = on({}), []
    for sizes in CALLS:
        pairs = [(name, a, b) for (name, a), (_, b) in zip(on(sizes), expected, strict=True)]
        differences = [float(np.abs(a - b).max() / np.abs(b).max()) for _, a, b in pairs]
        report.append({"mesh": sizes, "names": [name for name, *_ in pairs], "differences": differences})
    return report


def released_model_on_meshes():
    """The refusal of a mesh that its two key heads do not divide by; others must take every parameter of it."""
    for sizes in (dict(kv=2, q=4), dict(q=8), dict(fsdp=8)):
        with mesh.use_mesh(mesh.make_mesh(**sizes)):
            jax.eval_shape(lambda: Glm4v.init(Glm4vConfig.glm4_1v_9b()))
    with mesh.use_mesh(mesh.make_mesh(kv=4)):
        try:
            jax.eval_shape(lambda: Glm4v.init(Glm4vConfig.glm4_1v_9b()))
        except ConfigError as error:
            return str(error)
    return None
