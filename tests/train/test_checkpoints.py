"""Checkpoints of a job: the latest and the best are kept, and only the same job resumes from them."""

import contextlib
import errno
import gc
import logging
import resource
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from glm4v_jax.errors import CheckpointError
from train.checkpoints import DATA_DIGEST, ENCODING_DIGEST, SAMPLING_DIGEST, Checkpoints, abstract
from train.config import CheckpointConfig
from train.evaluate import Evaluation
from train.state import init_state

JOB = {"seed": 0, "freeze": ("vision",)}
NAN = float("nan")


@pytest.fixture(scope="module")
def state():
    return init_state({"kernel": jnp.arange(6.0).reshape(2, 3)}, optax.adamw(1e-3))


def opened(directory, best="score", job=JOB, log=None, evaluations=None, keep=1):
    log = [].append if log is None else log
    return Checkpoints(directory, CheckpointConfig(keep=keep, best=best), job, log, evaluations)


def at(state, step):
    """The state after a step: each has other parameters."""
    return state._replace(step=jnp.int32(step), params={"kernel": state.params["kernel"] + step})


EVALUATIONS = {
    1: Evaluation(3.0, 0.0, 0.5),
    2: Evaluation(2.0, 0.0, 0.5),
    3: Evaluation(2.0, 0.0, 0.5),
    4: Evaluation(NAN, 0.0, NAN),
    6: Evaluation(1.0, 0.0, None),
}
"""Three are equally good by their scores and two of these by their losses; one is NaN, and one step has none."""


@pytest.fixture(scope="module")
def directory(state, tmp_path_factory):
    """Checkpoints of six steps."""
    directory = tmp_path_factory.mktemp("checkpoints")
    checkpoints = opened(directory)
    for step in range(1, 7):
        checkpoints.save(at(state, step), {"at": step})
        if step in EVALUATIONS:
            checkpoints.evaluated(step, EVALUATIONS[step])
    checkpoints.close()
    return directory


def test_of_equal_scores_the_smallest_loss_and_then_the_first_is_kept(directory):
    assert {int(path.name) for path in directory.iterdir()} == {2, 6}
    metrics = {step: found.metrics for step, found in EVALUATIONS.items()}
    for best, step in (("score", 2), ("loss", 6), (None, None)):
        checkpoints = opened(directory, best, evaluations=metrics)
        assert (checkpoints.latest, checkpoints.best) == (6, step)
        assert ("50.0% after all 3 evaluations" in (checkpoints.tie() or "")) == (best == "score")
        checkpoints.close()


def test_the_best_one_is_known_without_the_file_of_evaluations(directory):
    with contextlib.closing(opened(directory)) as checkpoints:
        assert checkpoints.best == 2


def test_evaluations_of_checkpoints_that_somebody_removed_do_not_count(tmp_path, state):
    with contextlib.closing(opened(tmp_path, evaluations={2: {"score": 0.9, "loss": 1.0}})) as checkpoints:
        checkpoints.save(at(state, 1), {})
        checkpoints.evaluated(1, Evaluation(3.0, 0.0, 0.5))
        checkpoints.save(at(state, 2), {})
        checkpoints.wait()
        assert checkpoints.best == 1


def test_scores_that_differ_are_no_tie(directory):
    with contextlib.closing(opened(directory)) as checkpoints:
        for scores in ([0.5], [0.5, 0.25], []):
            checkpoints.evaluations = {step: {"score": score} for step, score in enumerate(scores)}
            assert checkpoints.tie() is None


def test_a_state_is_restored_from_its_shapes(directory, state):
    checkpoints = opened(directory)
    found, data = checkpoints.restore(abstract(state))
    assert (int(found.step), data) == (6, {"at": 6})
    jax.tree.map(np.testing.assert_array_equal, found.opt_state, state.opt_state)
    params = checkpoints.restore_params(abstract(state.params), 2)
    np.testing.assert_array_equal(params["kernel"], state.params["kernel"] + 2)
    checkpoints.close()


def test_all_changes_of_a_job_are_named(directory):
    with pytest.raises(CheckpointError, match=r"6: cannot resume .*: seed: found 1; expected 0, as saved; "):
        opened(directory, job=JOB | {"seed": 1})
    with pytest.raises(CheckpointError, match=r"seed: found 2; expected 0, .*freeze: found null; expected \["):
        opened(directory, job={"seed": 2})


def test_processes_that_share_no_disk_are_refused(directory, monkeypatch):
    monkeypatch.setattr("train.checkpoints.gathered", lambda step: [step, None])
    with pytest.raises(CheckpointError, match="found step 6 in process 0 and step None in process 1; expected one"):
        opened(directory)


def test_a_checkpoint_of_another_model_is_refused(directory, state):
    other = abstract(state._replace(params={"bias": state.params["kernel"]}))
    message = r"6: cannot resume from this checkpoint \(params\.bias: found nothing; expected \[2, 3\]\)"
    with contextlib.closing(opened(directory)) as checkpoints, pytest.raises(CheckpointError, match=message):
        checkpoints.restore(other)
    assert {path.name for path in directory.iterdir()} == {"2", "6"}


def test_running_out_of_memory_is_not_blamed_on_the_checkpoint(directory, state, monkeypatch):
    def full(*args):
        raise ValueError("RESOURCE_EXHAUSTED: out of memory")

    with contextlib.closing(opened(directory)) as checkpoints:
        monkeypatch.setattr(checkpoints._checkpointer, "load_checkpointables", full)
        with pytest.raises(ValueError, match="RESOURCE_EXHAUSTED"):
            checkpoints.restore(abstract(state))


DAMAGES = {
    "empty": lambda path: path.write_bytes(b""),
    "cut": lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]),
    "zeros": lambda path: path.write_bytes(bytes(path.stat().st_size)),
    "missing": lambda path: path.unlink(),
}


@pytest.fixture(scope="module")
def two(state, tmp_path_factory):
    """Checkpoints of two steps."""
    directory = tmp_path_factory.mktemp("two")
    checkpoints = opened(directory, None, keep=2)
    for step in (1, 2):
        checkpoints.save(at(state, step), {"at": step})
    checkpoints.close()
    return directory


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning", "ignore:coroutine")  # left by Orbax
def forget_other_tests(capfd, caplog):
    """What Orbax could not read in other tests is told of when it is collected, which may be at any time."""
    gc.collect()
    capfd.readouterr()
    caplog.clear()


class TestDamage:
    """Of the latest checkpoint: a crash of the machine leaves names without blocks, files cut short, or fewer."""

    @pytest.fixture
    def directory(self, two, tmp_path):
        return shutil.copytree(two, tmp_path / "checkpoints")

    @pytest.mark.slow
    @pytest.mark.parametrize("is_noted", [True, False])
    @pytest.mark.parametrize("kind", DAMAGES)
    def test_the_one_before_is_used_or_the_damage_is_harmless(self, two, state, tmp_path, kind, is_noted):
        """Whether the sizes of the files are known or not: a process may be killed before they are noted."""
        files = [path.relative_to(two) for path in sorted((two / "2").rglob("*")) if path.is_file()]
        used = {}
        for number, file in enumerate(files):
            directory, told = shutil.copytree(two, tmp_path / str(number)), []
            DAMAGES[kind](directory / file)
            if not is_noted:
                (directory / "2" / "sizes.json").unlink(missing_ok=True)
            with contextlib.closing(opened(directory, None, log=told.append)) as checkpoints:
                found, data = checkpoints.restore(abstract(state))
            step = used[file.as_posix()] = int(found.step)
            assert data == {"at": step}
            jax.tree.map(np.testing.assert_array_equal, found, at(state, step))
            names = {path.name for path in directory.iterdir()}
            assert names == ({"1", "2.damaged"} if step == 1 else {"1", "2"}), file
            assert len(told) == (step == 1)
            if told:
                assert f"{directory / '2'}: found damaged files (" in told[0] and "that of step 1" in told[0]
        if is_noted and kind != "zeros":
            assert used.pop("2/sizes.json") == 2 and set(used.values()) == {1}
        assert used["2/_CHECKPOINT_METADATA"] == used["2/state/manifest.ocdbt"] == 1
        assert {step for file, step in used.items() if file.startswith("2/state/d/")} == {1}

    def test_files_that_nfs_keeps_for_a_while_are_none_of_a_checkpoint(self, directory):
        kept = directory / "2" / "state" / ".nfs0001"
        kept.write_text("deleted while it is open")
        with contextlib.closing(opened(directory, None)) as checkpoints:
            checkpoints._note_sizes(2)
        kept.unlink()
        with contextlib.closing(opened(directory, None)) as checkpoints:
            assert checkpoints.latest == 2

    @pytest.mark.parametrize("where", ["params", "opt_state"])
    def test_numbers_that_are_not_finite_are_damage(self, directory, state, where, monkeypatch):
        monkeypatch.setattr("train.checkpoints.several", lambda: True)  # all processes find the same
        bad = jax.tree.map(lambda x: x if x.ndim == 0 else x.at[0, 1].set(NAN), getattr(state, where))
        shutil.rmtree(directory / "2")
        told = []
        with contextlib.closing(opened(directory, None, log=told.append, keep=2)) as checkpoints:
            checkpoints.save(at(state, 2)._replace(**{where: bad}), {"at": 2})
            checkpoints.wait()
            if where == "params":
                with pytest.raises(CheckpointError, match=r"2: found damaged files \(numbers that are not finite\)"):
                    checkpoints.restore_params(abstract(state.params), 2)
            assert int(checkpoints.restore(abstract(state)).state.step) == 1 == checkpoints.latest
        assert "2: found damaged files (numbers that are not finite)" in told[0] and "that of step 1" in told[0]
        assert {path.name for path in directory.iterdir()} == {"1", "2.damaged"}

    def test_other_finite_numbers_are_damage(self, directory, state, monkeypatch):
        load, told = Checkpoints._load, []

        def changed(self, step, content):
            found = load(self, step, content)
            return found | {"params": jax.tree.map(lambda x: x.at[1, 2].add(step - 1), found["params"])}

        monkeypatch.setattr(Checkpoints, "_load", changed)
        with contextlib.closing(opened(directory, None, log=told.append)) as checkpoints:
            assert int(checkpoints.restore(abstract(state)).state.step) == 1
        assert "2: found damaged files (other numbers than were saved: params); expected" in told[0]

    def test_a_missing_state_is_damage(self, directory, state):
        shutil.rmtree(directory / "2" / "state")
        with contextlib.closing(opened(directory, None)) as checkpoints:
            assert int(checkpoints.restore(abstract(state)).state.step) == 1

    def test_an_older_one_may_be_damaged_too(self, directory, state):
        shutil.copytree(directory / "1", directory / "0")
        for step in (0, 2):
            (directory / str(step) / "_CHECKPOINT_METADATA").write_bytes(b"")
        with contextlib.closing(opened(directory, None, keep=2)) as checkpoints:
            assert int(checkpoints.restore(abstract(state)).state.step) == 1
            checkpoints.save(at(state, 2), {})
        assert {path.name for path in directory.iterdir()} == {"1", "2", "2.damaged"}

    def test_its_step_is_saved_again(self, directory, state):
        for _ in range(2):
            (directory / "2" / "_CHECKPOINT_METADATA").write_bytes(b"")
            with contextlib.closing(opened(directory, None, keep=2)) as checkpoints:
                assert checkpoints.latest == 1
                checkpoints.restore(abstract(state))
                checkpoints.save(at(state, 2), {"at": 2})
            assert {path.name for path in directory.iterdir()} == {"1", "2", "2.damaged"}
            with contextlib.closing(opened(directory, None)) as checkpoints:
                assert int(checkpoints.restore(abstract(state)).state.step) == 2

    @pytest.mark.parametrize("part", ["_CHECKPOINT_METADATA", "state/manifest.ocdbt"])
    def test_a_job_never_begins_anew_by_itself(self, directory, state, part):
        for step in (1, 2):
            (directory / str(step) / part).write_bytes(b"")
        message = r"2: found damaged files .*1: found damaged files .*; no other is left: restore one of them"
        with pytest.raises(CheckpointError, match=message):  # noqa: SIM117
            with contextlib.closing(opened(directory, None)) as checkpoints:
                checkpoints.restore(abstract(state))
        assert {path.name for path in directory.iterdir()} == {"1", "2"}

    @pytest.mark.parametrize("is_noted", [True, False])
    def test_several_processes_resume_at_once_or_at_their_next_start(self, directory, state, monkeypatch, is_noted):
        """All see the sizes of files; one that finds damage later cannot reach the others, which wait for it."""
        DAMAGES["empty" if is_noted else "zeros"](directory / "2" / "state" / "manifest.ocdbt")
        monkeypatch.setattr("train.checkpoints.several", lambda: True)
        with contextlib.closing(opened(directory, None, keep=2)) as checkpoints:
            if is_noted:
                checkpoints.restore(abstract(state))
                checkpoints.save(at(state, 2), {})
            else:
                with pytest.raises(CheckpointError, match=r"2: found damaged .*the same command resumes from step 1"):
                    checkpoints.restore(abstract(state))
        with contextlib.closing(opened(directory, None)) as checkpoints:
            assert int(checkpoints.restore(abstract(state)).state.step) == (2 if is_noted else 1)

    def test_damage_is_one_line(self, directory, state, capfd, caplog):
        (directory / "2" / "state" / "manifest.ocdbt").write_bytes(b"")
        told = []
        forget_other_tests(capfd, caplog)
        with contextlib.closing(opened(directory, None, log=told.append)) as checkpoints:
            checkpoints.restore(abstract(state))
        damage = "found damaged files (state/manifest.ocdbt: 0 bytes of 113); expected a complete checkpoint"
        latest = "renamed to 2.damaged; the latest complete one is that of step 1"
        assert told == [f"{directory / '2'}: {damage}: {latest}"]
        assert capfd.readouterr() == ("", "") and not caplog.records

    @pytest.mark.parametrize(
        "error",
        [
            OSError(errno.EIO, "Input/output error"),
            MemoryError(),
            ValueError("UNAVAILABLE: no answer"),
            ValueError("NOT_FOUND: no access [os_error_code='13']"),
        ],
    )
    def test_trouble_of_the_machine_is_not_damage(self, directory, state, monkeypatch, error):
        def refuse(*args):
            raise error

        with contextlib.closing(opened(directory, None)) as checkpoints:
            monkeypatch.setattr(checkpoints._checkpointer, "load_checkpointables", refuse)
            with pytest.raises((type(error), OSError)) as caught:
                checkpoints.restore(abstract(state))
        assert "damaged" not in str(caught.value)
        assert {path.name for path in directory.iterdir()} == {"1", "2"}

    def test_a_damaged_best_checkpoint_is_named(self, directory, state):
        (directory / "1" / "state" / "manifest.ocdbt").write_bytes(b"")
        with contextlib.closing(opened(directory)) as checkpoints:  # noqa: SIM117
            with pytest.raises(CheckpointError, match=r"1: found damaged files .*exports the best of the others"):
                checkpoints.restore_params(abstract(state.params), 1)


@pytest.fixture
def limited_files(monkeypatch):
    """Of 8 kB at most: the system then refuses as it does on a full disk, though with another number."""
    monkeypatch.setattr("train.checkpoints.FULL", (errno.EFBIG,))
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (8192, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_full_disk_is_one_line_and_loses_no_complete_checkpoint(directory, state, tmp_path, request, capfd, caplog):
    directory = shutil.copytree(directory, tmp_path / "checkpoints")
    before = logging.getLogger("absl").level
    large = {"kernel": jax.random.normal(jax.random.key(0), (64, 128))}
    forget_other_tests(capfd, caplog)
    with contextlib.closing(opened(directory)) as checkpoints:
        request.getfixturevalue("limited_files")
        checkpoints.save(at(state, 7)._replace(params=large), {"at": 7})
        message = r"7: found a full disk \([\d,]+ bytes free\); .*: the one of step 6 is complete; the same command"
        with pytest.raises(CheckpointError, match=message):
            checkpoints.wait()
    assert capfd.readouterr() == ("", "") and not caplog.records
    assert logging.getLogger("absl").level == before
    with contextlib.closing(opened(directory)) as checkpoints:
        assert int(checkpoints.restore(abstract(state)).state.step) == 6


def test_room_is_counted_before_the_first_step(directory, state, monkeypatch):
    """Here for checkpoints of 88 bytes, of which two are there."""
    free = shutil._ntuple_diskusage(1000, 900, 100)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: free)
    like = abstract(state)
    with contextlib.closing(opened(directory)) as checkpoints:
        checkpoints.check_room(like, 5)  # the latest, the best, and the one that is being written
        checkpoints.check_room(like, 0, more=100)
        with pytest.raises(CheckpointError, match="expected 108 B: 1 checkpoint of 88 B and 20 B for the result; free"):
            checkpoints.check_room(like, 1, more=20)
    with contextlib.closing(opened(directory, keep=4)) as checkpoints:
        with pytest.raises(CheckpointError, match="expected 264 B: 3 checkpoints"):
            checkpoints.check_room(like, 3)
        with pytest.raises(CheckpointError, match="expected 352 B: 4 checkpoints of 88 B; free some, or lower"):
            checkpoints.check_room(like, 100)


@pytest.mark.parametrize("name", [DATA_DIGEST, ENCODING_DIGEST, SAMPLING_DIGEST])
def test_other_content_is_refused_unless_an_earlier_version_has_saved_no_digest(directory, state, tmp_path, name):
    told = []
    opened(directory, job=JOB | {name: "abc"}, log=told.append).close()
    assert len(told) == 1 and f"6: written by an earlier version, without a digest of the {name}" in told[0]
    with contextlib.closing(opened(tmp_path / "new", job=JOB | {name: "abc"})) as checkpoints:
        checkpoints.save(at(state, 1), {})
    with pytest.raises(CheckpointError, match=f'{name}: found "d"; expected "abc", as saved'):
        opened(tmp_path / "new", job=JOB | {name: "d"})
