"""tpu-inference 0.32.0 on a CPU: what of it only a TPU can do, replaced in each of vLLM's processes.

`register` is an entry point of `vllm.general_plugins`, which `plug_in` writes; only tests have it.
"""

import os
from pathlib import Path

TESTS = Path(__file__).parent
_MEMORY = (0, 2**30)
"""Bytes in use and bytes of a device; pages take nine tenths."""


OPTIONS = dict(
    dtype="float32",
    max_model_len=640,
    max_num_seqs=4,
    max_num_batched_tokens=512,
    disable_chunked_mm_input=True,
    limit_mm_per_prompt={"image": 2, "video": 1},
    mm_processor_kwargs={"size": {"shortest_edge": 112 * 112, "longest_edge": 512 * 28**2}},
    media_io_kwargs={"video": {"num_frames": -1}},
)
"""Of vLLM's engine: what docs/serve_vllm.md says is needed, and sizes of the tiny model."""


def register():
    """Replace compiler options, the order of devices, their memory, copies to them, and the kernel of attention."""
    import jax
    import numpy as np
    from helpers_vllm import paged_attention
    from tpu_inference import utils
    from tpu_inference.models.common import compiler_options

    # Modules copy these names when they are imported, so this comes first.
    compiler_options.get_step_fn_compiler_options = compiler_options.get_sampling_compiler_options = dict

    def make_mesh(shape, names, *, devices):
        return jax.sharding.Mesh(np.array(devices).reshape(shape), names)

    utils.make_optimized_mesh = make_mesh
    utils.hbm_usage_bytes = lambda devices: [_MEMORY for _ in devices]
    utils.hbm_usage_gb = lambda devices: [tuple(size / 2**30 for size in _MEMORY) for _ in devices]

    # On a CPU an array may stay NumPy's, which the runner writes the next step's values to while this one still runs.
    put = utils.general_device_put

    def put_copies(tree, *args, **options):
        return put(jax.tree.map(lambda x: x.copy() if isinstance(x, np.ndarray) else x, tree), *args, **options)

    utils.general_device_put = put_copies

    from tpu_inference.layers.common import attention_interface

    attention_interface.ragged_paged_attention = paged_attention


def environment(folder, devices=1, **variables):
    """Variables of a process of vLLM on `devices` simulated devices; `folder` is new, for files of its own."""
    made = folder / "glm4v_cpu-0.dist-info"
    made.mkdir(parents=True)
    (made / "METADATA").write_text("Metadata-Version: 2.1\nName: glm4v_cpu\nVersion: 0\n")
    (made / "entry_points.txt").write_text(f"[vllm.general_plugins]\nglm4v_cpu = {__name__}:register\n")
    path = os.pathsep.join(map(str, (folder, TESTS.parent, TESTS)))
    flags = ("--xla_backend_optimization_level=0", f"--xla_force_host_platform_device_count={devices}")
    return {
        "PYTHONPATH": path,
        "XLA_FLAGS": " ".join(flags),
        "JAX_PLATFORMS": "cpu",
        "HF_HUB_OFFLINE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_XLA_CACHE_PATH": str(TESTS.parent / ".cache" / "jax-vllm"),
        **variables,
    }
