"""Directories that appear under their names when they are complete, and replace checkpoints only."""

import errno
import fcntl
import os
import shutil
from pathlib import Path

import pytest

from glm4v_jax.checkpoints.atomic_directory import check_room, is_unfinished, new_directory
from glm4v_jax.errors import CheckpointError


def write(target, name="new", *, overwrite=False):
    with new_directory(target, overwrite=overwrite) as directory:
        (directory / "config.json").write_text(name)


def check_target(source, target, **options):
    check_room(source, target, 0, **options)


@pytest.fixture
def checkpoint(tmp_path):
    """As far as names go."""
    write(tmp_path / "out", "old")
    return tmp_path / "out"


def content(directory):
    return (directory / "config.json").read_text()


def test_a_new_directory_has_another_name_until_it_is_complete(tmp_path):
    with new_directory(tmp_path / "sub" / "out", overwrite=False) as directory:
        assert sorted(os.listdir(tmp_path / "sub")) == [".out.lock", ".out.unfinished"]
        assert is_unfinished(directory)
    assert os.listdir(tmp_path / "sub") == ["out"] and not is_unfinished(tmp_path / "sub" / "out")


def test_parents_that_were_made_go_with_it(tmp_path):
    (tmp_path / "there").mkdir()
    with pytest.raises(KeyError), new_directory(tmp_path / "there" / "a" / "b" / "new", overwrite=False):
        assert (tmp_path / "there" / "a" / "b").is_dir()
        raise KeyError
    assert list(tmp_path.rglob("*")) == [tmp_path / "there"]


def test_an_empty_directory_is_filled(tmp_path):
    check_target(None, tmp_path, overwrite=False)
    write(tmp_path)
    assert content(tmp_path) == "new"


def test_a_path_that_ends_with_dots_is_resolved(tmp_path):
    write(tmp_path / "out" / "sub" / "..")
    assert os.listdir(tmp_path) == ["out"] and content(tmp_path / "out") == "new"


def test_a_checkpoint_is_replaced_once_the_new_one_is_complete(checkpoint):
    with new_directory(checkpoint, overwrite=True) as directory:
        (directory / "config.json").write_text("new")
        assert content(checkpoint) == "old"
    assert content(checkpoint) == "new" and os.listdir(checkpoint.parent) == ["out"]


@pytest.mark.parametrize("name", ["config.json", "model-00001-of-00009.safetensors", "_CHECKPOINT_METADATA"])
def test_a_checkpoint_is_refused_without_overwrite(tmp_path, name):
    (tmp_path / name).write_text("{}")
    with pytest.raises(
        CheckpointError, match="found a checkpoint; expected nothing, or an empty directory: --overwrite replaces it"
    ):
        check_target(None, tmp_path, overwrite=False)
    check_target(None, tmp_path, overwrite=True)


@pytest.mark.parametrize("overwrite", [False, True])
def test_other_files_are_never_replaced(tmp_path, overwrite):
    (tmp_path / "precious").write_text("kept")
    with pytest.raises(
        CheckpointError,
        match=r"found precious, which is not a checkpoint; expected nothing, an empty directory, or a checkpoint",
    ):
        check_target(None, tmp_path, overwrite=overwrite)


@pytest.mark.parametrize("place", [".", "inside", ".."])
def test_the_source_is_refused(checkpoint, place):
    with pytest.raises(CheckpointError, match="found the source, or a directory in or around it"):
        check_target(checkpoint, checkpoint / place, overwrite=True)


def test_a_file_is_refused(tmp_path):
    (tmp_path / "out").write_text("")
    with pytest.raises(CheckpointError, match="out: found something that is not a directory"):
        check_target(None, tmp_path / "out", overwrite=True)


@pytest.mark.parametrize("place", ["/", "disk"])
def test_a_mount_point_is_refused(tmp_path, monkeypatch, place):
    """It cannot be renamed."""
    monkeypatch.setattr(os.path, "ismount", lambda path: Path(path) in (Path("/"), tmp_path / "disk"))
    with pytest.raises(CheckpointError, match="found a mount point, which cannot be replaced; expected"):
        check_target(None, tmp_path / place, overwrite=True)


def test_too_small_a_disk_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10**9, 10**9 - 1000, 1000))
    check_room(None, tmp_path / "out", 1000, overwrite=False)
    with pytest.raises(CheckpointError, match=r"out: needs 1,001 bytes, found 1,000 free"):
        check_room(None, tmp_path / "sub" / "out", 1001, overwrite=False)


@pytest.mark.parametrize(
    ("error", "raised"),
    [
        (KeyboardInterrupt(), KeyboardInterrupt),
        (OSError(errno.EACCES, "Permission denied"), PermissionError),
        (OSError(errno.ENOSPC, "No space left on device"), CheckpointError),
    ],
)
def test_after_an_error_the_old_checkpoint_is_there_and_the_new_one_gone(checkpoint, error, raised):
    with pytest.raises(raised), new_directory(checkpoint, overwrite=True) as directory:
        (directory / "config.json").write_text("new")
        raise error
    assert os.listdir(checkpoint.parent) == ["out"] and content(checkpoint) == "old"


def test_a_full_disk_is_reported(tmp_path):
    with (
        pytest.raises(
            CheckpointError, match=r"out: found a full disk \([\d,]+ bytes free\); expected .* what was written"
        ),
        new_directory(tmp_path / "out", overwrite=False),
    ):
        raise OSError(errno.ENOSPC, "No space left on device")


def test_leftovers_of_a_killed_run_are_removed(tmp_path):
    left = tmp_path / ".out.unfinished"
    (left / "folder").mkdir(parents=True)
    (left / "model-00001-of-00009.safetensors").write_bytes(b"half")
    write(tmp_path / "out")
    assert os.listdir(tmp_path) == ["out"] and os.listdir(tmp_path / "out") == ["config.json"]


@pytest.mark.parametrize("dry_run", [False, True])
def test_a_checkpoint_that_a_killed_run_had_moved_aside_gets_its_name_back(checkpoint, dry_run):
    """The kill came between the two renames of a replacement. A dry run changes nothing."""
    checkpoint.rename(checkpoint.parent / ".out.replaced")
    with pytest.raises(
        CheckpointError, match="out: found a checkpoint; expected nothing, or an empty directory: --overwrite"
    ):
        check_target(None, checkpoint, overwrite=False, dry_run=dry_run)
    check_target(None, checkpoint, overwrite=True, dry_run=dry_run)
    assert os.listdir(checkpoint.parent) == [".out.replaced" if dry_run else "out"]
    assert dry_run or content(checkpoint) == "old"


def test_what_the_next_run_writes_is_left_alone(tmp_path, monkeypatch):
    """It may begin as soon as this run's directory has its name."""
    rename = Path.rename

    def and_the_next_begins(path, target):
        rename(path, target)
        path.mkdir()
        (path / "next").write_text("written")

    monkeypatch.setattr(Path, "rename", and_the_next_begins)
    write(tmp_path / "out")
    assert content(tmp_path / "out") == "new" and os.listdir(tmp_path / ".out.unfinished") == ["next"]


def test_a_disk_without_locks_is_named(tmp_path, monkeypatch):
    def refuse(*args):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", refuse)
    with pytest.raises(OSError) as caught:
        write(tmp_path / "out")
    assert caught.value.errno == errno.ENOLCK and caught.value.filename == str(tmp_path / ".out.lock")


def test_two_runs_into_one_directory_do_not_mix(tmp_path):
    with new_directory(tmp_path / "out", overwrite=False) as directory:
        (directory / "config.json").write_text("first")
        with (
            pytest.raises(CheckpointError, match="out: found another process writing it"),
            new_directory(tmp_path / "out", overwrite=False),
        ):
            pytest.fail("both have the lock")
    assert content(tmp_path / "out") == "first"
