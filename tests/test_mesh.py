"""One device and many: the same logits, tokens and gradients on any mesh.

Run as a program, `python test_mesh.py CHECKPOINT`, this file computes them on eight simulated devices; the devices of a
process are fixed when JAX starts, so the test starts another.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from glm4v_jax import mesh
from glm4v_jax.errors import ConfigError

MESHES = [dict(), dict(fsdp=2, kv=2, q=2)]
ROWS = [[9], [2, ("image", (4, 6)), 3], [4, ("image", (2, 8)), 2, ("video", (2, 2, 4)), 1], [30]]


def test_axes_of_logical_names():
    assert mesh.spec("batch", "length", "kv_heads", "q_groups", None) == P(("data", "fsdp"), None, "kv", "q", None)
    assert mesh.spec("embed", "mlp") == P("fsdp", ("kv", "q"))
    assert mesh.gathered("embed", "mlp") == P(None, ("kv", "q"))
    with pytest.raises(KeyError):
        mesh.spec("nonsense")


def test_too_few_devices():
    needed = 2 * len(jax.devices())
    with pytest.raises(
        ConfigError, match=f"data={needed} fsdp=1 kv=1 q=1 needs {needed} devices, found {len(jax.devices())}"
    ):
        mesh.make_mesh(data=needed)


def test_the_current_mesh_is_kept():
    with mesh.use_mesh() as outer, mesh.use_mesh() as inner:
        assert inner == outer and mesh.data_shards() == 1
        assert inner.axis_names == mesh.AXES


@pytest.mark.usefixtures("mesh")
def test_models_are_the_same_on_every_mesh(checkpoints):
    environment = os.environ | {
        "XLA_FLAGS": "--xla_force_host_platform_device_count=8",
        "JAX_PLATFORMS": "cpu",
        "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent.parent), str(Path(__file__).parent)]),
    }
    done = subprocess.run(
        [sys.executable, __file__, str(checkpoints("base"))],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    report = json.loads(done.stdout.splitlines()[-1])
    assert [case["mesh"] for case in report] == MESHES[1:]
    for case in report:
        assert case["tokens_equal"]
        assert case["logits"] <= 1e-5 and case["loss"] <= 1e-6
        assert case["gradients"] <= 1e-4, case["worst_gradient"]
        assert case["split"] > 0.9  # of the parameters; or the meshes would be the same in all but name


def main(directory):
    from reference import Prompts, export

    from glm4v_jax import Glm4vConfig, Glm4vForConditionalGeneration, make_batch
    from glm4v_jax.programs import causal_lm_loss

    config = Glm4vConfig.from_pretrained(directory)
    prompts = Prompts(config, ROWS, padding="right", seed=1)

    def compute(sizes):
        with jax.set_mesh(mesh.make_mesh(**sizes)) as _:
            model = Glm4vForConditionalGeneration.from_pretrained(directory, stacked=True)
            tokens = model.generate(**prompts.inputs, max_new_tokens=12, eos_token_id=-1, pad_token_id=0)
            batch, _ = make_batch(config=config, **prompts.inputs, batch_multiple=4)
            labels = np.where(batch.segment_ids * (batch.input_ids < 300) > 0, batch.input_ids, -100)

            def loss(module):
                logits = module.logits(module(batch))
                return causal_lm_loss(logits, labels), logits

            (value, logits), gradient = jax.jit(jax.value_and_grad(loss, has_aux=True))(model.module)
            leaves = jax.tree.leaves(model.module)
            whole = sum(leaf.size for leaf in leaves)
            split = sum(leaf.size for leaf in leaves if leaf.addressable_shards[0].data.size < leaf.size) / whole
            return np.asarray(logits)[batch.segment_ids > 0], tokens, float(value), export(gradient, config), split

    logits, tokens, loss, gradient, _ = compute(MESHES[0])
    report = []
    for sizes in MESHES[1:]:
        found = compute(sizes)
        worst = {k: float(np.abs(found[3][k] - g).max() / np.abs(g).max()) for k, g in gradient.items()}
        report.append(
            {
                "mesh": sizes,
                "logits": float(np.abs(found[0] - logits).max() / np.abs(logits).max()),
                "tokens_equal": bool(np.array_equal(found[1], tokens)),
                "loss": abs(found[2] - loss) / loss,
                "gradients": max(worst.values()),
                "worst_gradient": max(worst, key=worst.__getitem__),
                "split": found[4],
            }
        )
    print(json.dumps(report))  # noqa: T201


if __name__ == "__main__":
    main(sys.argv[1])
