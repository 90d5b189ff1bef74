"""Checkpoints of a job: the latest and the best are kept, and only the same job resumes from them."""

import contextlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from glm4v_jax.errors import CheckpointError
from train.checkpoints import Checkpoints, abstract
from train.config import CheckpointConfig
from train.evaluate import Evaluation
from train.state import init_state

JOB = {"seed": 0, "freeze": ("vision",)}
NAN = float("nan")


@pytest.fixture(scope="module")
def state():
    return init_state({"kernel": jnp.arange(6.0).reshape(2, 3)}, optax.adamw(1e-3))


def opened(directory, best="score", job=JOB):
    return Checkpoints(directory, CheckpointConfig(keep=1, best=best), job)


@pytest.fixture(scope="module")
def directory(state, tmp_path_factory):
    """Checkpoints of five steps: two are equally good, one is NaN, one was not evaluated."""
    directory = tmp_path_factory.mktemp("checkpoints")
    checkpoints = opened(directory)
    found = [Evaluation(3.0, 0.0, 0.5), Evaluation(2.0, 0.0, 0.5), Evaluation(NAN, 0.0, NAN), None]
    for step, evaluation in enumerate([*found, Evaluation(1.0, 0.0, None)], 1):
        now = state._replace(step=jnp.int32(step), params={"kernel": state.params["kernel"] + step})
        checkpoints.save(now, {"at": step}, evaluation)
    checkpoints.close()
    return directory


def test_the_first_of_the_best_is_kept(directory):
    assert {int(path.name) for path in directory.iterdir()} == {1, 5}
    for best, step in (("score", 1), ("loss", 5), (None, None)):
        checkpoints = opened(directory, best)
        assert (checkpoints.latest, checkpoints.best) == (5, step)
        checkpoints.close()


def test_a_state_is_restored_from_its_shapes(directory, state):
    checkpoints = opened(directory)
    found, data = checkpoints.restore(abstract(state))
    assert (int(found.step), data) == (5, {"at": 5})
    jax.tree.map(np.testing.assert_array_equal, found.opt_state, state.opt_state)
    params = checkpoints.restore_params(abstract(state.params), 1)
    np.testing.assert_array_equal(params["kernel"], state.params["kernel"] + 1)
    checkpoints.close()


def test_all_changes_of_a_job_are_named(directory):
    with pytest.raises(CheckpointError, match=r"5: cannot resume .*: seed: found 1; expected 0, as saved; "):
        opened(directory, job=JOB | {"seed": 1})
    with pytest.raises(CheckpointError, match=r"seed: found 2; expected 0, .*freeze: found null; expected \["):
        opened(directory, job={"seed": 2})


def test_processes_that_share_no_disk_are_refused(directory, monkeypatch):
    monkeypatch.setattr("train.checkpoints.gathered", lambda step: [step, None])
    with pytest.raises(CheckpointError, match="found step 5 in process 0 and step None in process 1; expected one"):
        opened(directory)


def test_a_checkpoint_of_another_model_is_refused(directory, state):
    other = abstract(state._replace(params={"bias": state.params["kernel"]}))
    resume = pytest.raises(CheckpointError, match="cannot resume from this checkpoint")
    with contextlib.closing(opened(directory)) as checkpoints, resume:
        checkpoints.restore(other)


def test_running_out_of_memory_is_not_blamed_on_the_checkpoint(directory, state, monkeypatch):
    def full(*args):
        raise ValueError("RESOURCE_EXHAUSTED: out of memory")

    with contextlib.closing(opened(directory)) as checkpoints:
        monkeypatch.setattr(checkpoints._checkpointer, "load_checkpointables", full)
        with pytest.raises(ValueError, match="RESOURCE_EXHAUSTED"):
            checkpoints.restore(abstract(state))
