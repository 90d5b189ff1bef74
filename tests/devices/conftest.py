"""No test here is part of a job that runs the tests."""

import pytest
from helpers_commands import run_python  # noqa: F401

LAUNCHER_VARIABLES = (
    "SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE", "OMPI_MCA_orte_hnp_uri", "KUBERNETES_SERVICE_HOST",
    "JOB_COMPLETION_INDEX",
)  # fmt: skip


@pytest.fixture(autouse=True)
def _no_launcher(monkeypatch):
    for name in LAUNCHER_VARIABLES:
        monkeypatch.delenv(name, raising=False)
