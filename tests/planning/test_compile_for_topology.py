"""The text of compiled programs, and programs compiled for a TPU slice."""

import json
import os
import subprocess
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from helpers_paths import ROOT

from bench.aot import aot_environment
from glm4v_jax.config.model import Glm4vConfig
from glm4v_jax.errors import ConfigError
from glm4v_jax.planning import compile_for_topology, hlo

TEXT = """
HloModule jit_f, entry_computation_layout={(f32[4]{0})->f32[4]{0}}

%add (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  ROOT %sum = f32[] add(%a, %b)
}

%fused (p: bf16[8,256]) -> bf16[8,256] {
  ROOT %copy.9 = bf16[8,256]{0,1} copy(%p)
}

%all-reduce-scatter.1 (p: bf16[8,256]) -> bf16[2,256] {
  %all-reduce.9 = bf16[8,256]{1,0} all-reduce(%p), channel_id=3, to_apply=%add
  ROOT %dynamic-slice.9 = bf16[2,256]{1,0} dynamic-slice(%all-reduce.9, %i, %zero), dynamic_slice_sizes={2,256}
}

%inner_body (p: (s32[], bf16[1024,1024])) -> (s32[], bf16[1024,1024]) {
  %all-reduce.1 = bf16[8,1,4096]{2,1,0} all-reduce(%x), channel_id=1, to_apply=%add
  %copy.1 = bf16[1024,1024]{0,1} copy(%y)
  %copy.2 = bf16[1024,1024]{0,1:T(8,128)S(1)} copy(%y)
  %fusion.1 = bf16[8,256]{0,1} fusion(%z), kind=kLoop, calls=%fused
  %fusion.2 = bf16[2,256]{1,0} fusion(%z), kind=kCustom, calls=%all-reduce-scatter.1
  %fusion.3 = bf16[2,256]{1,0} fusion(%z), kind=kCustom, calls=%all-reduce-scatter.1
}

%inner_condition (p: (s32[], bf16[1024,1024])) -> pred[] {
  ROOT %less = pred[] compare(%i, %n), direction=LT
}

%branch (p: f32[4]) -> f32[4] {
  %all-gather-start.1 = (f32[4]{0}, f32[8,151552]{1,0}) all-gather-start(%p), channel_id=2
  %all-gather-done.1 = f32[8,151552]{1,0} all-gather-done(%all-gather-start.1)
}

ENTRY %main (p: f32[4]) -> f32[4] {
  %while.1 = (s32[], bf16[1024,1024]) while(%t), condition=%inner_condition, body=%inner_body
  %conditional.1 = f32[4]{0} conditional(%c, %p, %p), branch_computations={%branch, %branch}
  ROOT %transpose.1 = f32[4,2]{1,0} transpose(%p), dimensions={0}
}
"""


def test_instructions_are_read_with_their_loops():
    found = list(hlo.instructions(TEXT))
    moves = [(one.name, one.loops, one.in_hbm, one.nbytes) for one in found if one.opcode in hlo.MOVES]
    assert moves == [
        ("copy.1", 1, True, 2 * 2**20), ("copy.2", 1, False, 2 * 2**20), ("transpose.1", 0, True, 32)
    ]  # fmt: skip
    collectives = [(one.opcode, one.loops, one.is_conditional) for one in found if one.opcode in hlo.COLLECTIVES]
    assert collectives == [
        ("all-reduce", 1, False), ("reduce-scatter", 1, False), ("all-gather", 0, True), ("all-gather", 0, True)
    ]  # fmt: skip


LOOP = """
%condition (p: (s32[], bf16[8,256])) -> pred[] {
  %p = (s32[], bf16[8,256]) parameter(0)
  %constant.1 = s32[]{:T(128)} constant(40)
  %i = s32[]{:T(128)} get-tuple-element(%p), index=0
  ROOT %less = pred[] compare(%i, %constant.1), direction=LT
}

%body (p: (s32[], bf16[8,256])) -> (s32[], bf16[8,256]) {
  %all-gather.1 = bf16[8,256]{1,0} all-gather(%x), channel_id=1, replica_groups={{0,1,2,3},{4,5,6,7}}, dimensions={0}
  %fusion.2 = bf16[8,256]{1,0} fusion(%all-gather.1), kind=kLoop, backend_config={"estimated_cycles":"721"}
  %collective-permute-start.1 = (bf16[4,256]{1,0}, bf16[4,256]{1,0}, u32[], u32[]) collective-permute-start(%y)
  %fusion.all-reduce-scatter = bf16[2,256]{1,0} fusion(%z), kind=kCustom, calls=%all-reduce-scatter.1
}

%all-reduce-scatter.1 (p: bf16[8,256]) -> bf16[2,256] {
  %all-reduce.9 = bf16[8,256]{1,0} all-reduce(%p), channel_id=3, replica_groups=[2,4]<=[8], to_apply=%add
  ROOT %slice = bf16[2,256]{1,0} dynamic-slice(%all-reduce.9, %i, %zero), dynamic_slice_sizes={2,256}
}

ENTRY %main (p: f32[4]) -> f32[4] {
  %while.1 = (s32[], bf16[8,256]) while(%t), condition=%condition, body=%body
  %sum = f32[4]{0} all-reduce(%p), channel_id=4, replica_groups=mesh['a'=2,'b'=4] {'b'}, to_apply=%add
  %part = bf16[2,256]{1,0} reduce-scatter(%w), channel_id=5, replica_groups=[1,8]<=[8], dimensions={0}
}
"""


def test_received_bytes_and_runs_of_collectives():
    """Of 4 KiB in groups of four: three quarters for a gathering or a sum in shards, twice that for a sum."""
    found = {one.opcode + one.channel: (one.runs, one.received) for one in hlo.instructions(LOOP) if one.received}
    assert found == {
        "all-gather": (40, 3072), "collective-permute": (40, 2048), "reduce-scatter3": (40, 3072),
        "all-reduce": (1, 2 * 12), "reduce-scatter": (1, 7 * 1024),
    }  # fmt: skip


def test_estimated_cycles_of_instructions_are_read():
    assert [(one.name, one.cycles, one.runs) for one in hlo.instructions(LOOP) if one.cycles] == [("fusion.2", 721, 40)]


UNROLLED = """
%condition (p: (bf16[8,256], u32[])) -> pred[] {
  %limit = u32[]{:T(128)} constant(7)
  %p = (bf16[8,256], u32[]) parameter(0)
  %i = u32[]{:T(128)} get-tuple-element(%p), index=1
  ROOT %less = pred[]{:T(512)} compare(%i, %limit), direction=LT
}

%body (p: (bf16[8,256], u32[])) -> (bf16[8,256], u32[]) {
  %two = u32[]{:T(128)} constant(2)
  %p = (bf16[8,256], u32[]) parameter(0)
  %i = u32[]{:T(128)} get-tuple-element(%p), index=1
  %collective-permute.1 = bf16[4,256]{1,0} collective-permute(%x)
  %next = u32[]{:T(128)} add(%i, %two)
  ROOT %tuple = (bf16[8,256], u32[]) tuple(%collective-permute.1, /*index=1*/%next)
}

ENTRY %main (p: f32[4]) -> f32[4] {
  %while.1 = (bf16[8,256], u32[]) while(%t), condition=%condition, body=%body
}
"""


def test_a_loop_that_the_compiler_has_unrolled_counts_in_steps():
    """Seven parts of a product in shards, two in each run of the body."""
    assert {one.runs for one in hlo.instructions(UNROLLED) if one.opcode == "collective-permute"} == {4}


def test_nested_loops_of_a_compiled_program_are_counted():
    def outer(x):
        return jax.lax.fori_loop(0, 3, lambda _, x: jax.lax.fori_loop(0, x.shape[0], lambda _, y: jnp.sin(y @ y), x), x)

    text = jax.jit(outer).lower(jnp.ones((4, 4))).compile().as_text()
    assert max(one.loops for one in hlo.instructions(text)) == 2


def test_bytes_and_flops_of_the_9b():
    config = Glm4vConfig.glm4_1v_9b()
    decode = compile_for_topology.decode_program(config, 8, 4096)
    assert decode.read == 8 * 4096 * 40 * 1024  # 40 KiB a token
    assert 17.5e9 < decode.flops / 8 < 20.5e9  # twice the parameters, and attention to 4,096 tokens
    prefill = compile_for_topology.prefill_program(config, 1, 1, 1)
    assert prefill.flops == pytest.approx(16.3e9, rel=0.01)
    encode = compile_for_topology.encode_program(config, 1, 24576, 24576)
    assert encode.flops > 24576 * 2 * 24 * 28e6  # the weights of its blocks alone


def test_an_unknown_slice_is_refused():
    with pytest.raises(ConfigError, match="topology: found 'v9:2x2'"):
        compile_for_topology.topology_mesh("v9:2x2")


@pytest.mark.parametrize(
    "topology", ["v5e", "v5e:", "v5e:axb", "v5e:8", "v5e:2x0", "v5e:2x-4", "v5e:2x2x2x2", "v5e:2x4:"]
)
def test_an_invalid_layout_is_refused(topology):
    with pytest.raises(ConfigError, match=f"topology: found '{topology}'; expected one of v5e, v6e, v5p, as in"):
        compile_for_topology.topology_mesh(topology)


def test_a_layout_that_the_compiler_refuses_is_reported(monkeypatch):
    def refuse(**kwargs):
        raise jax.errors.JaxRuntimeError("INVALID_ARGUMENT: not divisible")

    monkeypatch.setattr("jax.experimental.topologies.get_topology_desc", refuse)
    with pytest.raises(ConfigError, match=r"topology: found 'v5e:3x5', which the compiler refuses \(INVALID_ARG"):
        compile_for_topology.topology_mesh("v5e:3x5")


FEW = 4
"""MiB; a device's share of a layer's largest kernel is 8."""


@pytest.fixture(scope="module")
def compiled():
    """What a narrow model's programs are on a v5e:2x2; skips where there is no environment with libtpu."""
    root = ROOT
    if not (root / ".venv-aot" / "aot.stamp").exists():
        pytest.skip("no environment with libtpu: make .venv-aot/aot.stamp")
    python = root / ".venv-aot" / "bin" / "python"
    # Without what the tests tell XLA of a CPU: libtpu does not know it. Nor can its programs be read from a cache.
    others = {"PYTHONPATH": str(root), "XLA_FLAGS": "", "JAX_ENABLE_COMPILATION_CACHE": "false"}
    environment = os.environ | aot_environment() | others
    command = [str(python), str(Path(__file__).with_name("aot_programs.py"))]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    names = (
        "decode", "prefill", "decode, slots split", "training step", "a row beside others", "many short rows",
        "a quantised row on one chip", "a copy of a row", "handover",
    )  # fmt: skip
    return dict(zip(names, map(json.loads, done.stdout.splitlines()), strict=True))


def test_decoding_sums_twice_per_layer_and_copies_nothing(compiled):
    """Two all-reduces a layer, of what attention and the MLP add; nothing is copied, and little is put down."""
    found = compiled["decode"]
    assert {kind: inside for kind, (inside, _) in found["collectives"].items() if inside} == {"all-reduce": 2}
    assert found["copies"] == []
    assert found["temporaries"] * 2**10 <= FEW


def test_a_single_row_copies_nothing_on_one_chip(compiled):
    """Where key heads are not sharded, either, and kernels are integers; the other parts of the model fit beside it."""
    found = compiled["a quantised row on one chip"]
    assert found["copies"] == []
    assert found["temporaries"] * 2**10 <= FEW
    assert found["beside"] > 0.3 and found["estimated_ms"] > max(found["floor_ms"])


def test_prefill_gathers_and_scatters_twice_per_layer(compiled):
    """A gathering before, and a sum in shards after, each of attention and the MLP."""
    found = compiled["prefill"]
    inside = {kind: inside for kind, (inside, _) in found["collectives"].items() if inside}
    assert inside == {"all-gather": 2, "reduce-scatter": 2}
    assert found["copies"] == []
    assert found["temporaries"] * 2**10 <= FEW


@pytest.mark.parametrize("name", ["a row beside others", "many short rows"])
def test_short_prompts_do_not_copy_the_cache(compiled, name):
    """And compile at all: a loop over rows in the writing of the cache does not."""
    assert compiled[name]["copies"] == []
    assert compiled[name]["temporaries"] * 2**10 <= 2 * FEW


def test_a_copy_of_a_row_takes_the_memory_of_a_row(compiled):
    """And exchanges nothing."""
    found = compiled["a copy of a row"]
    assert found["copies"] == [] and found["collectives"] == {}
    assert found["temporaries"] * 2**10 <= FEW


def test_sharded_slots_are_not_replicated(compiled):
    """Three small sums more a layer, and a cache that lies on no two devices."""
    whole, split = compiled["decode"], compiled["decode, slots split"]
    inside = {kind: inside for kind, (inside, _) in split["collectives"].items() if inside}
    assert inside == {"all-reduce": 4, "all-gather": 1, "reduce-scatter": 1}
    assert split["copies"] == []
    assert whole["held"] > 1.2 > 1.03 > split["held"]


def test_a_training_step_gathers_weights_and_scatters_gradients(compiled):
    """A layer's weights are gathered in each loop over layers, gradients summed into shards, and logits stay split.

    Two loops with seven kernels and biases that lie in shards of the hidden size, the states before and after both
    blocks, and again backward.
    """
    found = compiled["training step"]
    counts = {kind: inside for kind, (inside, _) in found["collectives"].items() if inside}
    assert counts == {"all-gather": 18, "reduce-scatter": 8, "all-reduce": 2}
    assert not any(inside for _, inside in found["copies"])
    # Weights and gradients in bfloat16 are a third of the weights and two moments in float32.
    assert found["temporaries"] <= 0.5 * found["arguments"]


def test_a_handover_gathers_layer_by_layer(compiled):
    """At once, copies of all gathered layers would be there beside the result, or whole weights of all layers."""
    found = compiled["handover"]
    assert found["collectives"]["all-gather"][0] > 0
    assert found["temporaries"] < found["outputs"]
