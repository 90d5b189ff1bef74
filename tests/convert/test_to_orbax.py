"""To Orbax: every bit arrives, whatever the dtypes, shards and names; and what is not finished does not look so.

Run as a program, `python test_to_orbax.py PORT PROCESSES INDEX SOURCE DIRECTORY`, this file converts as one of several
processes, and then again where the last steps fail.
"""

import errno
import hashlib
import json
import os
import resource
import shutil
import sys
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
import pytest
from helpers_orbax import assert_same_weights, contents, start_distributed
from helpers_processes import run_together
from orbax.checkpoint import v1 as ocp
from reference import CONFIGS, random_tensors

from convert.to_orbax import to_orbax
from glm4v_jax import Glm4vForConditionalGeneration
from glm4v_jax.checkpoints import orbax_write
from glm4v_jax.checkpoints.orbax_read import open_weights
from glm4v_jax.checkpoints.safetensors import CheckpointFiles, write_safetensors
from glm4v_jax.config.model import Glm4vConfig
from glm4v_jax.errors import CheckpointError, ConfigError

pytestmark = pytest.mark.slow

CONFIG = Glm4vConfig.from_dict(CONFIGS["base"])


def write(directory, tensors, *, config="base", shards=1, metadata=None):
    """A checkpoint in Hugging Face layout."""
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps(CONFIGS[config] | {"dtype": "float32"}))
    (directory / "tokenizer_config.json").write_text("{}")
    names, weight_map = list(tensors), {}
    for i in range(shards):
        file = f"model-{i + 1:05d}-of-{shards:05d}.safetensors" if shards > 1 else "model.safetensors"
        write_safetensors(directory / file, {name: tensors[name] for name in names[i::shards]}, metadata)
        weight_map |= dict.fromkeys(names[i::shards], file)
    if shards > 1:
        (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return directory


@pytest.fixture
def source(tmp_path):
    return write(tmp_path / "source", random_tensors(CONFIG))


@pytest.mark.parametrize("shards", [1, 2, 4])
@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16, np.float16])
def test_every_bit_arrives(dtype, shards, tmp_path):
    tensors = {name: tensor.astype(dtype) for name, tensor in random_tensors(CONFIG, seed=shards).items()}
    source = write(tmp_path / "source", tensors, shards=shards, metadata={"format": "pt", "by": "a test"})
    progress = []
    summary = to_orbax(source, tmp_path / "target", progress=lambda *now: progress.append(now))
    nbytes = sum(tensor.nbytes for tensor in tensors.values())
    assert (summary.tensors, summary.nbytes, summary.bytes_read) == (len(tensors), nbytes, nbytes)
    assert progress[-1] == (nbytes, nbytes) and not summary.notes
    assert_same_weights(tmp_path / "target", source)
    assert [path.name for path in sorted(tmp_path.iterdir())] == ["source", "target"]


@pytest.mark.parametrize("name", ["tester", "odd", "wide", "mha"])
def test_models_of_other_configurations_are_converted(name, checkpoints, tmp_path):
    to_orbax(checkpoints(name), tmp_path / "target")
    assert_same_weights(tmp_path / "target", checkpoints(name))


@pytest.mark.parametrize(
    "rename",
    [
        lambda name: name.removeprefix("model."),
        lambda name: name.replace("model.language_model.", "model."),
        lambda name: f"model.{name}" if name.startswith("lm_head") else name,
    ],
)
def test_spellings_of_names_are_kept(rename, tmp_path):
    source = write(tmp_path / "source", {rename(name): tensor for name, tensor in random_tensors(CONFIG).items()})
    to_orbax(source, tmp_path / "target")
    assert_same_weights(tmp_path / "target", source)


def test_tensors_of_several_dtypes_keep_them(tmp_path):
    """The parts of a fused leaf may differ too: each is given back as it was."""
    tensors = random_tensors(CONFIG)
    narrow = {name: tensor.astype(ml_dtypes.bfloat16) for name, tensor in tensors.items() if "norm" not in name}
    del narrow["model.visual.merger.up_proj.weight"]
    source = write(tmp_path / "source", tensors | narrow)
    to_orbax(source, tmp_path / "target")
    assert_same_weights(tmp_path / "target", source)


@pytest.fixture
def tied():
    return random_tensors(Glm4vConfig.from_dict(CONFIGS["tester"]))


def test_a_copy_of_a_tied_head_is_kept(tied, tmp_path):
    head = tied["model.language_model.embed_tokens.weight"]
    source = write(tmp_path / "source", tied | {"lm_head.weight": head}, config="tester")
    assert not to_orbax(source, tmp_path / "target").notes
    assert_same_weights(tmp_path / "target", source)


def test_another_head_than_the_tied_one_is_skipped_and_noted(tied, tmp_path):
    head = tied["model.language_model.embed_tokens.weight"] + 1
    source = write(tmp_path / "source", tied | {"lm_head.weight": head}, config="tester")
    (note,) = to_orbax(source, tmp_path / "target").notes
    assert note.startswith("lm_head.weight is skipped")
    assert "lm_head.weight" not in open_weights(tmp_path / "target")


def test_provenance_describes_the_source(tmp_path):
    source = write(tmp_path / "source", random_tensors(CONFIG), shards=3, metadata={"format": "pt", "by": "a test"})
    to_orbax(source, tmp_path / "target")
    found = ocp.metadata(tmp_path / "target").custom_metadata["glm4v_jax"]
    assert found["source"]["directory"] == "source" and found["metadata"] == {"format": "pt", "by": "a test"}
    assert found["source"]["files"] == [
        {
            "name": path.name, "bytes": path.stat().st_size, "sha256": hashlib.sha256(path.read_bytes()).hexdigest()
        }
        for path in sorted(source.glob("*.safetensors"))
    ]  # fmt: skip
    assert found["tensors"] == [[name, "float32", info.file.name] for name, info in open_weights(source).items()]
    assert contents(tmp_path / "target" / "assets").keys() == {"config.json", "tokenizer_config.json"}
    to_orbax(source, tmp_path / "quick", hash_files=False)
    found = ocp.metadata(tmp_path / "quick").custom_metadata["glm4v_jax"]
    assert {file["sha256"] for file in found["source"]["files"]} == {None}


def test_orbax_to_orbax_keeps_all(source, tmp_path):
    to_orbax(source, tmp_path / "one")
    to_orbax(tmp_path / "one", tmp_path / "two")
    assert_same_weights(tmp_path / "two", source)
    one, two = (open_weights(tmp_path / name).provenance for name in ("one", "two"))
    assert one["tensors"] == two["tensors"] and one["source"]["files"] == two["source"]["files"]


def test_a_cast_is_recorded(source, tmp_path):
    summary = to_orbax(source, tmp_path / "target", dtype="bf16")
    tensors, files = random_tensors(CONFIG), open_weights(tmp_path / "target")
    assert summary.nbytes * 2 == sum(tensor.nbytes for tensor in tensors.values())
    for name, tensor in tensors.items():
        assert files.read(name).tobytes() == tensor.astype(ml_dtypes.bfloat16).tobytes()
    assert json.loads((tmp_path / "target" / "assets" / "config.json").read_text())["dtype"] == "bfloat16"
    assert files.provenance["cast"] == "bfloat16"


def test_large_leaves_are_copied_in_pieces(source, tmp_path, monkeypatch):
    """By several threads; here all are."""
    monkeypatch.setattr("glm4v_jax.checkpoints.leaves._PIECE_BYTES", 3000)
    monkeypatch.setattr("glm4v_jax.checkpoints.strided_copy._SMALL_BYTES", 0)
    monkeypatch.setattr(orbax_write, "GROUP_BYTES", 20_000)
    to_orbax(source, tmp_path / "target")
    assert_same_weights(tmp_path / "target", source)


def test_a_dry_run_checks_and_writes_nothing(source, tmp_path, monkeypatch):
    monkeypatch.setattr(CheckpointFiles, "read", lambda *_: pytest.fail("read a tensor"))
    summary = to_orbax(source, tmp_path / "target", dry_run=True)
    assert summary.dry_run and summary.tensors == len(random_tensors(CONFIG)) and summary.bytes_read == 0
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_nothing_is_written_before_everything_fits(tmp_path):
    tensors = random_tensors(CONFIG)
    tensors["model.language_model.norm.weight"] = np.ones(63, np.float32)
    tensors["model.more"] = np.ones(3, np.float32)
    tensors["model.visual.post_layernorm.weight"] = np.ones(32, np.int32)
    del tensors["lm_head.weight"]
    source = write(tmp_path / "source", tensors)
    with pytest.raises(CheckpointError) as caught:
        to_orbax(source, tmp_path / "target")
    for part in (
        "language_model.norm.weight: found shape [63] in model.safetensors; expected [64]",
        "model.more: found [3] in model.safetensors; expected no such tensor",
        "model.visual.post_layernorm.weight: found int32",
        "lm_head.weight: found nothing; expected [320, 64]",
    ):
        assert part in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_a_checkpoint_is_replaced(source, tmp_path):
    (tmp_path / "target").mkdir()
    (tmp_path / "target" / "config.json").write_text("{}")
    to_orbax(source, tmp_path / "target", overwrite=True)
    assert_same_weights(tmp_path / "target", source)
    assert [path.name for path in sorted(tmp_path.iterdir())] == ["source", "target"]


def test_a_mesh_without_its_devices_is_refused(source, tmp_path):
    with pytest.raises(ConfigError, match="needs 64 devices"):
        from glm4v_jax.devices.mesh import make_mesh

        to_orbax(source, tmp_path / "target", mesh=make_mesh(fsdp=64))


class TestFullDisk:
    def test_is_noticed_before_writing(self, source, tmp_path, monkeypatch):
        monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**6, 10**6 - 999, 999))
        with pytest.raises(CheckpointError, match=r"target: needs [\d,]+ bytes, found 999 free"):
            to_orbax(source, tmp_path / "target")
        assert [path.name for path in tmp_path.iterdir()] == ["source"]

    def test_while_writing_leaves_nothing(self, source, tmp_path):
        """A limit of the process on the size of files: the system refuses the data as a full disk does."""
        before = contents(source)
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
        try:
            with pytest.raises(OSError, match="File too large"):
                to_orbax(source, tmp_path / "target")
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        assert contents(source) == before and [path.name for path in tmp_path.iterdir()] == ["source"]
        to_orbax(source, tmp_path / "target")
        assert_same_weights(tmp_path / "target", source)

    def test_is_recognised_in_the_words_of_tensorstore(self, source, tmp_path, monkeypatch):

        def full(path):
            raise ValueError("RESOURCE_EXHAUSTED: Failed writing: No space left on device [os_error_code='28']")

        monkeypatch.setattr(ocp.partial, "finalize", full)
        with pytest.raises(CheckpointError, match="target: found a full disk"):
            to_orbax(source, tmp_path / "target")
        assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_an_interrupt_leaves_nothing(source, tmp_path, monkeypatch):
    monkeypatch.setattr(orbax_write, "GROUP_BYTES", 20_000)

    def interrupt(done, total):
        if done > total // 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        to_orbax(source, tmp_path / "target", progress=interrupt)
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


class Together(NamedTuple):
    """What two processes say of their conversions of a source into folders of a directory."""

    source: Path
    directory: Path
    reports: list[dict[str, Any]]


@pytest.fixture(scope="module")
def together(tmp_path_factory):
    directory = tmp_path_factory.mktemp("together")
    source = write(tmp_path_factory.mktemp("source") / "source", random_tensors(CONFIG), shards=2)
    outputs = run_together(__file__, source, directory)
    return Together(source, directory, [json.loads(out.splitlines()[-1]) for out in outputs])


def test_two_processes_read_half_each_and_write_the_same(together, tmp_path):
    source, converted = together.source, together.directory / "whole"
    to_orbax(source, tmp_path / "alone")
    assert_same_weights(converted / "target", source)
    assert_same_weights(converted / "target", tmp_path / "alone")
    one, two = (open_weights(path).provenance for path in (tmp_path / "alone", converted / "target"))
    assert one["source"] == two["source"] and one["tensors"] == two["tensors"]
    reports = [report["whole"] for report in together.reports]
    total = reports[0]["nbytes"]
    for report in reports:
        assert 0.45 * total < report["read"] < 0.55 * total
        assert report["bytes_filled"] == report["read"]
        assert report["shard"] == [32, 320]
    assert_same_weights(converted / "saved", source, ordered=False)  # it has the names of transformers, in its order
    assert sorted(path.name for path in converted.iterdir()) == ["saved", "target"]


@pytest.mark.parametrize("step", ["orbax", "target"])
def test_two_processes_fail_together(together, step):
    """The last steps are those of the first; if the disk refuses them, the other does not wait for ever."""
    first, second = (report[step] for report in together.reports)
    assert "target: found a full disk" in first
    told = "target: found a full disk" if step == "target" else "No space left on device"
    assert second.startswith("in the first process: ") and told in second
    assert not list((together.directory / f"full at {step}").iterdir())
    assert [path.name for path in together.source.parent.iterdir()] == ["source"]


def fail(source, target, step):
    """Convert where a step is refused, and return what is said of it."""
    rename = Path.rename

    def refused(path, other):
        if (path.parent.name == step) or Path(other) == Path(target) == Path(target).with_name(step):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return rename(path, other)

    with pytest.MonkeyPatch.context() as patch, pytest.raises((CheckpointError, OSError)) as caught:
        patch.setattr(Path, "rename", refused)
        to_orbax(source, target)
    return str(caught.value)


def convert(source, folder, processes):
    """Convert, load the result and save it again; returns what this process read, and what it has of a leaf."""
    from glm4v_jax.checkpoints import leaves
    from glm4v_jax.devices.mesh import make_mesh

    asked = []
    whole = leaves.TensorLeaves.fill

    def fill(self, out, path, index):
        asked.append(out)
        whole(self, out, path, index)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(leaves.TensorLeaves, "fill", fill)
        summary = to_orbax(source, target := folder / "target")
    filled = sum(x.nbytes for x in asked)
    model = Glm4vForConditionalGeneration.from_pretrained(target, mesh=make_mesh(fsdp=processes))
    shard = model.module.lm_head.kernel[...].addressable_shards[0].data.shape
    model.save_orbax(folder / "saved")
    return dict(read=summary.bytes_read, nbytes=summary.nbytes, bytes_filled=filled, shard=shard)


def main(port, processes, index, source, directory):
    start_distributed(port, processes, index)
    folders = {"whole": "whole", "orbax": "full at orbax", "target": "full at target"}
    folders = {name: Path(directory) / folder for name, folder in folders.items()}
    for folder in folders.values():
        folder.mkdir(exist_ok=True)  # by whichever process is first
    report = {"whole": convert(source, folders["whole"], int(processes))}
    report |= {step: fail(source, folders[step] / "target", step) for step in ("orbax", "target")}
    print(json.dumps(report))  # noqa: T201


if __name__ == "__main__":
    main(*sys.argv[1:])
