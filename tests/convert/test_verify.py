"""Comparing checkpoints: what is equal, what differs and by how much, in any format."""

import hashlib

import ml_dtypes
import numpy as np
import pytest
from helpers_convert import read_all
from reference import CONFIGS, random_tensors

from convert import verify as verify_module
from convert.to_hf import to_hf
from convert.to_orbax import to_orbax
from convert.verify import verify
from glm4v_jax.checkpoints.safetensors import write_safetensors
from glm4v_jax.config.model import Glm4vConfig
from glm4v_jax.errors import CheckpointError

CONFIG = Glm4vConfig.from_dict(CONFIGS["base"])
NAME = "model.language_model.layers.1.mlp.down_proj.weight"


def write(directory, tensors, config=CONFIG):
    directory.mkdir()
    config.save_pretrained(directory)
    write_safetensors(directory / "model.safetensors", tensors)
    return directory


@pytest.fixture
def pair(tmp_path):
    """A function: change one tensor of two equal checkpoints, and compare them."""

    def compare(change, dtype=np.float32):
        tensors = {name: tensor.astype(dtype) for name, tensor in random_tensors(CONFIG).items()}
        left = write(tmp_path / "left", tensors)
        changed = {name: tensor.copy() for name, tensor in tensors.items()}
        change(changed)
        return verify(left, write(tmp_path / "right", changed))

    return compare


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_any_two_formats_of_one_checkpoint_are_equal(synthetic, tmp_path, dtype):
    source = synthetic(dtype)
    to_orbax(source, tmp_path / "orbax")
    to_hf(source, tmp_path / "other", max_shard_size="50KB")
    reports = [
        verify(source, tmp_path / "orbax"), verify(tmp_path / "orbax", tmp_path / "other"), verify(source, source),
        verify(tmp_path / "orbax", tmp_path / "orbax"),
    ]  # fmt: skip
    assert not any(report.different() for report in reports)
    assert len({checksum for r in reports for checksum in (r.left_checksum, r.right_checksum)}) == 1
    assert all(tensor.is_equal for tensor in reports[0].tensors)


def test_checksums_are_those_that_anyone_can_compute(synthetic):
    report = verify(synthetic(), synthetic())
    lines = []
    for name, tensor in read_all(synthetic()).items():
        content = f"{tensor.dtype.name} {list(tensor.shape)}\n".encode() + tensor.tobytes()
        lines.append((name.removeprefix("model."), hashlib.sha256(content).hexdigest()))
    assert {tensor.name: tensor.left_checksum for tensor in report.tensors} == dict(lines)
    text = "".join(f"{checksum}  {name}\n" for name, checksum in sorted(lines))
    assert report.left_checksum == report.right_checksum == hashlib.sha256(text.encode()).hexdigest()


def test_one_different_number_is_found(pair):
    def change(tensors):
        tensors[NAME][3, 7] += 0.25

    report = pair(change)
    (different,) = report.different()
    assert different.name == NAME.removeprefix("model.")
    assert different.unequal == 1 and different.max_difference == pytest.approx(0.25, rel=1e-5)
    assert report.left_checksum != report.right_checksum
    assert different.left_checksum != different.right_checksum
    assert report.different(0.2) and not report.different(0.3)


def test_a_bit_of_the_last_number_is_found(pair, monkeypatch):
    monkeypatch.setattr(verify_module, "_CHUNK", 50)

    def change(tensors):
        tensors[NAME].view(np.uint16).reshape(-1)[-1] ^= 1

    (different,) = pair(change, ml_dtypes.bfloat16).different()
    assert different.unequal == 1 and 0 < different.max_difference < 0.01


@pytest.mark.parametrize(("value", "most"), [(np.nan, np.inf), (np.inf, np.inf), (-0.0, 0.0)])
def test_nan_infinity_and_negative_zero_are_found(tmp_path, value, most):
    tensors = random_tensors(CONFIG)
    tensors[NAME][0, 0] = 0.0
    left = write(tmp_path / "left", tensors)
    tensors[NAME][0, 0] = value
    right = write(tmp_path / "right", tensors)
    (different,) = verify(left, right).different()
    assert different.unequal == 1 and different.max_difference == most
    assert not verify(right, right).different()
    assert len(verify(left, right).different(1.0)) == (most > 0)


def test_missing_and_misshapen_tensors_are_found(pair):
    def change(tensors):
        tensors[NAME] = tensors[NAME].T
        del tensors["lm_head.weight"]
        tensors["extra"] = np.zeros((2, 3), np.float16)

    report = pair(change)
    found = {t.name: (t.left, t.right, t.unequal, t.max_difference) for t in report.different(1e9)}
    assert found == {
        NAME.removeprefix("model."): ("float32 [64, 96]", "float32 [96, 64]", None, None),
        "lm_head.weight": ("float32 [320, 64]", None, None, None),
        "extra": (None, "float16 [2, 3]", None, None),
    }


def test_other_dtypes_of_equal_numbers_pass_with_a_tolerance(tmp_path):
    tensors = {name: tensor.astype(np.float16) for name, tensor in random_tensors(CONFIG).items()}
    left = write(tmp_path / "left", tensors)
    right = write(tmp_path / "right", {name: tensor.astype(np.float32) for name, tensor in tensors.items()})
    report = verify(left, right)
    assert len(report.different()) == len(tensors) and not report.different(1e-30)
    assert {t.max_difference for t in report.tensors} == {0.0} and {t.unequal for t in report.tensors} == {0}


def test_names_are_compared_without_prefixes(tmp_path):
    tensors = random_tensors(CONFIG)
    left = write(tmp_path / "left", tensors)
    right = write(tmp_path / "right", {name.removeprefix("model."): tensor for name, tensor in tensors.items()})
    assert not verify(left, right).different()


def test_a_copy_of_a_tied_head_does_not_count(checkpoints, tmp_path):
    config = Glm4vConfig.from_dict(CONFIGS["tester"])
    tensors = random_tensors(config)
    tensors["lm_head.weight"] = tensors["model.language_model.embed_tokens.weight"]
    assert not verify(checkpoints("tester"), write(tmp_path / "copy", tensors, config)).different()


@pytest.mark.parametrize("order", [1, -1])
def test_a_tensor_under_two_names_is_refused(tmp_path, order):
    """Even if one of them is equal to the other side's."""
    tensors = random_tensors(CONFIG)
    left = write(tmp_path / "left", tensors)
    right = write(tmp_path / "right", tensors | {NAME.removeprefix("model."): tensors[NAME] + 1})
    with pytest.raises(CheckpointError, match=rf"right: {NAME}: found besides [\w.]+; expected one of them"):
        verify(*(left, right)[::order])


def test_a_missing_checkpoint_is_named(synthetic, tmp_path):
    with pytest.raises(CheckpointError, match="nowhere"):
        verify(synthetic(), tmp_path / "nowhere")


def test_progress_ends_with_all_bytes(synthetic):
    told = []
    report = verify(synthetic(), synthetic(), progress=lambda *now: told.append(now))
    assert told[-1] == (report.nbytes, report.nbytes) and len(told) == len(report.tensors)
