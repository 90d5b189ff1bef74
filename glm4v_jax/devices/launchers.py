"""The launcher that has started this program as one of several processes, if any: from the environment, without JAX."""

import importlib.util
import os
from pathlib import Path

# Launcher -> variables with the number of processes, and that mark a process as one of them.
_COUNTS = {
    "Slurm": ("SLURM_STEP_NUM_TASKS", "SLURM_PROCID"),
    "Open MPI": ("OMPI_COMM_WORLD_SIZE", "OMPI_MCA_orte_hnp_uri"),
}
_TPU_WORKERS = ("TPU_PROCESS_ADDRESSES", "TPU_WORKER_HOSTNAMES")
_TPU_CHIPS = ("/dev/accel0", "/dev/vfio/0")


def launcher() -> str | None:
    """The launcher that may have started several processes of this program.

    Returns:
      "Slurm" or "Open MPI" for a step of more than one process, "Kubernetes" in a pod of an indexed job, "Cloud TPU" on
      a host of a slice that has several hosts or does not say how many; otherwise None.
    """
    for name, (count, mark) in _COUNTS.items():
        if mark in os.environ and os.environ.get(count, "1") != "1":
            return name
    if "KUBERNETES_SERVICE_HOST" in os.environ and "JOB_COMPLETION_INDEX" in os.environ:
        return "Kubernetes"
    return "Cloud TPU" if _is_tpu_host_among_several() else None


def _is_tpu_host_among_several() -> bool:
    if importlib.util.find_spec("libtpu") is None or not any(Path(chip).exists() for chip in _TPU_CHIPS):
        return False
    workers = next((os.environ[name] for name in _TPU_WORKERS if name in os.environ), None)
    if workers is not None:
        return "," in workers
    # The metadata server knows; JAX asks it, unless this variable forbids it.
    return "TPU_SKIP_MDS_QUERY" not in os.environ
