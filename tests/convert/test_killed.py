"""After kill -9 at any moment nothing passes for complete, the source is unchanged, and a rerun succeeds."""

import contextlib
import os
import random
import shutil
import signal
import subprocess
import sys
import time

import pytest
from helpers_orbax import assert_same_weights, contents, environment

from convert.synth import load_config, synth
from convert.to_orbax import to_orbax
from glm4v_jax.checkpoints.compressed_tensors import match
from glm4v_jax.checkpoints.orbax_read import open_weights
from glm4v_jax.config.model import Glm4vConfig, Glm4vTextConfig
from glm4v_jax.config.quantization import stored_quantization
from glm4v_jax.errors import CheckpointError

KILLS = 6
"""One in each sixth of what is written."""

# Imports once; a child for each line on standard input, so that a run takes no longer than its work.
SERVER = """
import functools, os, sys
from convert.quantize import quantize
from convert.to_hf import to_hf
from convert.to_orbax import to_orbax
from glm4v_jax.checkpoints import orbax_write
orbax_write.GROUP_BYTES = 1_000_000
programs = {
    "to_hf": functools.partial(to_hf, max_shard_size="1MB"),
    "quantize": functools.partial(quantize, max_shard_size="1MB"),
    "to_orbax": functools.partial(to_orbax, hash_files=False),
}
print("ready", flush=True)
for line in sys.stdin:
    name, *directories = line.split()
    child = os.fork()
    if child == 0:
        programs[name](*directories)
        os._exit(0)
    print(child, flush=True)
    sys.stdin.readline()  # until then the child has its number, even if it has ended
    _, status = os.waitpid(child, 0)
    print(status, flush=True)
"""


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """What each program converts: some 15 MB; for `to_orbax`, which is slower, 5 MB."""
    directory = tmp_path_factory.mktemp("killed")
    tiny = load_config("tiny")
    text = Glm4vTextConfig.from_dict(tiny.text_config.to_dict() | {"num_hidden_layers": 12, "intermediate_size": 1500})
    config = Glm4vConfig(text, **{k: getattr(tiny, k) for k in tiny.__dataclass_fields__ if k != "text_config"})
    synth(config, directory / "hf", dtype="float32", count=3)
    to_orbax(directory / "hf", directory / "orbax")
    synth(tiny, directory / "small", dtype="float32", count=3)
    return {"to_hf": directory / "orbax", "quantize": directory / "hf", "to_orbax": directory / "small"}


@pytest.fixture(scope="module")
def server():
    process = subprocess.Popen(
        [sys.executable, "-W", "ignore", "-c", SERVER], env=environment(), stdin=subprocess.PIPE,
        stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert process.stdout.readline() == "ready\n"
    yield process
    process.stdin.close()
    assert process.wait(30) == 0


def convert(server, program, source, target, kill_at=None):
    """Convert in a process of its own, killed when it has written so many bytes; returns its wait status."""
    server.stdin.write(f"{program} {source} {target}\n")
    server.stdin.flush()
    child = int(server.stdout.readline())
    if kill_at is not None:
        while written(unfinished(target)) < kill_at and not target.exists():
            time.sleep(0.0005)
        os.kill(child, signal.SIGKILL)
    server.stdin.write("\n")
    server.stdin.flush()
    return int(server.stdout.readline())


def unfinished(target):
    return target.with_name(f".{target.name}.unfinished")


def written(directory):
    """Bytes in a directory that is being written."""
    count = 0
    for root, _, names in os.walk(directory):
        for name in names:
            with contextlib.suppress(FileNotFoundError):  # files get their names when they are complete
                count += os.stat(os.path.join(root, name)).st_size
    return count


def passes_for_complete(directory):
    try:
        match(
            Glm4vConfig.from_pretrained(directory), open_weights(directory), str(directory),
            stored_quantization(directory),
        )  # fmt: skip
    except CheckpointError:
        return False
    return True


@pytest.mark.parametrize("program", ["to_hf", "quantize", "to_orbax"])
def test_a_kill_at_any_moment_leaves_nothing_that_passes_for_complete(server, checkpoints, tmp_path, program):
    source, target, whole = checkpoints[program], tmp_path / "target", tmp_path / "whole"
    assert convert(server, program, source, whole) == 0
    if program != "quantize":
        assert_same_weights(whole, source, ordered=False)
    before, size, killed = contents(source), written(whole), 0
    moments = random.Random(0)
    for kill, part in enumerate(moments.sample(range(KILLS), KILLS)):
        moment = (part + moments.random()) / KILLS * size
        killed += convert(server, program, source, target, moment) == signal.SIGKILL
        for directory in (unfinished(target), *unfinished(target).glob("orbax*")):
            assert not passes_for_complete(directory)
        assert contents(source) == before
        # The rerun succeeds, from whatever is there; every second one is killed too.
        if not target.exists() and kill % 2:
            assert convert(server, program, source, target) == 0
        if target.exists():
            assert_same_weights(target, whole, ordered=False)  # in Hugging Face layout they are sorted
            shutil.rmtree(target)
            assert [path.name for path in tmp_path.iterdir()] == ["whole"]
    assert killed > KILLS // 2, "most runs were over before the kill"
