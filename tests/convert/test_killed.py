"""After kill -9 at any moment of `to-hf` nothing passes for complete, the source is unchanged, a rerun succeeds."""

import contextlib
import os
import random
import shutil
import signal
import subprocess
import sys
import time

import pytest
from helpers_convert import files_of
from helpers_paths import ROOT

from convert.synth import load_config, synth
from convert.to_hf import to_hf
from convert.to_orbax import to_orbax
from glm4v_jax.checkpoints import hf_mapping
from glm4v_jax.checkpoints.orbax_read import open_weights
from glm4v_jax.config.model import Glm4vConfig, Glm4vTextConfig
from glm4v_jax.errors import CheckpointError

KILLS = 10

# Imports once; a child for each line on standard input, so that a run takes no longer than its work.
SERVER = """
import os, sys
from convert.to_hf import to_hf
print("ready", flush=True)
for line in sys.stdin:
    child = os.fork()
    if child == 0:
        to_hf(*line.split(), max_shard_size="1MB")
        os._exit(0)
    print(child, flush=True)
    sys.stdin.readline()  # until then the child has its number, even if it has ended
    _, status = os.waitpid(child, 0)
    print(status, flush=True)
"""


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """Some 15 MB, in Orbax format."""
    directory = tmp_path_factory.mktemp("killed")
    tiny = load_config("tiny")
    text = Glm4vTextConfig.from_dict(tiny.text_config.to_dict() | {"num_hidden_layers": 12, "intermediate_size": 1500})
    config = Glm4vConfig(text, **{k: getattr(tiny, k) for k in tiny.__dataclass_fields__ if k != "text_config"})
    synth(config, directory / "hf", dtype="float32", count=3)
    to_orbax(directory / "hf", directory / "orbax")
    return directory / "orbax"


@pytest.fixture(scope="module")
def server():
    process = subprocess.Popen(
        [sys.executable, "-c", SERVER], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "ready\n"
    yield process
    process.stdin.close()
    assert process.wait(30) == 0


def convert(server, source, target, kill_at=None):
    """Convert in a process of its own, killed when it has written so many bytes; returns its wait status."""
    server.stdin.write(f"{source} {target}\n")
    server.stdin.flush()
    child = int(server.stdout.readline())
    if kill_at is not None:
        unfinished = target.with_name(f".{target.name}.unfinished")
        while written(unfinished) < kill_at and not target.exists():
            time.sleep(0.0005)
        os.kill(child, signal.SIGKILL)
    server.stdin.write("\n")
    server.stdin.flush()
    return int(server.stdout.readline())


def written(directory):
    """Bytes in a directory that is being written."""
    count = 0
    with contextlib.suppress(FileNotFoundError):  # files get their names when they are complete
        for path in directory.iterdir():
            count += path.stat().st_size
    return count


def complete(directory, expected):
    """Whether a directory passes for a checkpoint; if so, it must be one."""
    try:
        hf_mapping.match(Glm4vConfig.from_pretrained(directory), open_weights(directory), str(directory))
    except CheckpointError:
        return False
    assert {name: content for name, content in files_of(directory).items() if "model" in name} == expected
    return True


def test_a_kill_at_any_moment_leaves_nothing_that_passes_for_complete(server, checkpoint, tmp_path):
    whole = tmp_path / "whole"
    to_hf(checkpoint, whole, max_shard_size="1MB")
    expected = {name: content for name, content in files_of(whole).items() if "model" in name}
    source = {path: path.read_bytes() for path in checkpoint.rglob("*") if path.is_file()}
    target = tmp_path / "target"
    chance, killed = random.Random(0), 0
    for _ in range(KILLS):
        status = convert(server, checkpoint, target, chance.uniform(0, sum(map(len, expected.values()))))
        killed += status == signal.SIGKILL
        left = tmp_path / ".target.unfinished"
        if target.exists():
            assert complete(target, expected)
        if left.exists():
            assert not complete(left, expected)
        assert {path: path.read_bytes() for path in checkpoint.rglob("*") if path.is_file()} == source
        # The rerun succeeds, from whatever is there.
        if not target.exists():
            assert convert(server, checkpoint, target) == 0
        assert not left.exists() and complete(target, expected)
        shutil.rmtree(target)
    assert killed > KILLS // 2, "most runs were over before the kill"
