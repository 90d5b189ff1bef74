"""`glm4v mesh`, and `--mesh` of the commands that answer."""

import contextlib
import io
import json

import pytest
from helpers_checkpoints import RANDOM_CHECKPOINT
from helpers_cli import refused, save_noise

from glm4v_jax.cli.main import main as glm4v
from glm4v_jax.planning.mesh_presets import PRESETS

ONE = ["generate", "--greedy", "--max-new-tokens", "12", "--image", "noise.png", "What is this?"]
MANY = ["generate", "--greedy", "--max-new-tokens", "6", "--jsonl", "prompts.jsonl", "--slots", "1", "--out"]
# tests/planning/test_mesh_presets_equal.py computes with all presets.
FOR_ONE, FOR_MANY = (None, "latency:8"), (None, "throughput:8")


def shown(capfd, *arguments):
    """Runs `glm4v mesh`; returns what it prints."""
    assert glm4v(["mesh", *map(str, arguments)]) == 0
    captured = capfd.readouterr()
    assert captured.err == ""
    return captured.out


def error_of(capfd, *arguments):
    """Runs `glm4v mesh`; expects status 1 and one line of error; returns it."""
    assert glm4v(["mesh", *map(str, arguments)]) == 1
    captured = capfd.readouterr()
    assert captured.out == "" and captured.err.startswith("glm4v: error: ") and captured.err.count("\n") == 1
    return captured.err.removeprefix("glm4v: error: ").rstrip("\n")


# `glm4v mesh`.


def test_a_preset_of_the_released_model(capfd):
    out = shown(capfd, "latency", "--devices", 8, "--rows", 8, "--memory", 16)
    lines = out.splitlines()
    assert lines[0].split() == ["part", "array", "shape", "split", "by", "in", "all", "a", "device"]
    (embedding,) = (line.split() for line in lines if line.startswith("embedding"))
    assert embedding == ["embedding", "1.16", "GiB", "148.00", "MiB"]
    assert lines[-1] == (
        "mesh kv=2,q=4: a device holds 2.69 GiB of weights and 640.00 MiB of a cache of 8 x 4096 slots, together "
        "3.31 GiB in bfloat16, 20.7% of 16.00 GiB"
    )


def test_a_released_checkpoint_by_name(capfd):
    small, large = (
        json.loads(shown(capfd, "data=1", "--model", name, "--json")) for name in ("glm-ocr", "GLM-4.6V-Flash")
    )
    assert small["device_bytes"] < large["device_bytes"] / 8


def test_axes_and_another_model(capfd):
    out = shown(capfd, "fsdp=2,kv=2", "--model", RANDOM_CHECKPOINT, "--dtype", "float32", "--capacity", 64, "--json")
    found = json.loads(out)
    assert found["mesh"] == dict(data=1, fsdp=2, kv=2, q=1, seq=1) and found["num_devices"] == 4
    assert (found["dtype"], found["rows"], found["capacity"]) == ("float32", 1, 64)
    assert found["device_bytes"] == found["weight_bytes"] + found["cache_bytes"]
    assert found["memory"] is None and found["share"] is None
    half = json.loads(shown(capfd, "fsdp=2,kv=2", "--model", RANDOM_CHECKPOINT, "--capacity", 64, "--json"))
    assert half["device_bytes"] * 2 == found["device_bytes"]


def test_the_presets_are_compared(capfd):
    found = json.loads(shown(capfd, "--devices", 4, "--memory", 16, "--json"))
    assert list(found) == list(PRESETS)
    assert [one["mesh"] for one in found.values()] == [
        dict(data=1, fsdp=1, kv=2, q=2, seq=1),
        dict(data=1, fsdp=1, kv=2, q=2, seq=1),
        dict(data=1, fsdp=4, kv=1, q=1, seq=1),
        dict(data=1, fsdp=1, kv=2, q=1, seq=2),
    ]
    out = " ".join(shown(capfd, "--devices", 4, "--memory", 16).split())
    for text in (
        "latency kv=2,q=2",
        "train fsdp=4",
        "long-context kv=2,seq=2",
        "4 devices, bfloat16; besides weights: a cache of 1 x 4096 tokens, for train gradients and optimizer state",
        "train does not fit; the smallest mesh that does has",
    ):
        assert text in out
    assert f"{found['train']['share']:.1%}" in out and found["train"]["share"] > 1 and found["latency"]["fits"]
    smallest = found["train"]["smallest"]
    assert smallest["num_devices"] > 4 and smallest["share"] <= 1 and "smallest" not in found["latency"]


def test_axes_count_training_where_they_are_asked_to(capfd):
    plain = json.loads(shown(capfd, "fsdp=8", "--json"))
    training = json.loads(shown(capfd, "fsdp=8", "--train", "--json"))
    assert training["device_bytes"] > 6 * plain["device_bytes"] and training["cache_bytes"] == 0
    assert training == json.loads(shown(capfd, "train:8", "--json"))


def test_what_fits_no_mesh_is_said(capfd):
    out = shown(capfd, "latency", "--devices", 1, "--memory", 0.5)
    assert out.splitlines()[-1] == "latency does not fit, and no mesh of such devices does"
    out = shown(capfd, "data=1", "--memory", 16)
    assert out.splitlines()[-1].startswith(
        "data=1 does not fit; the smallest mesh that does has 2 such devices: kv=2, "
    )


def test_the_devices_of_this_machine_are_the_default(capfd):
    found = json.loads(shown(capfd, "train", "--json"))
    import jax

    assert found["num_devices"] == jax.device_count()


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (["fast"], "mesh: found 'fast'; expected one of the presets latency, throughput, train, long-context"),
        (["tp=2"], "mesh: found 'tp=2' in 'tp=2'; expected some of data, fsdp, kv, q, seq"),
        (["latency", "train"], "PRESET|AXES: found 2; expected at most one"),
        (["latency", "--devices", 0], "--devices: found 0; expected an integer of at least 1"),
        (["latency:4", "--devices", 8], "--devices: found 8, and a mesh of 4; expected one of the two"),
        (["fsdp=2", "--devices", 8], "--devices: found 8, and a mesh of 2; expected one of the two"),
        (["latency", "--memory", -1], "--memory: found -1.0; expected a number above 0"),
        (["latency", "--memory", "nan"], "--memory: found nan; expected a number"),
        (["latency", "--rows", 0], "--rows: found 0; expected an integer of at least 1"),
        (["latency", "--model", "nowhere"], "--model: found nowhere, which is not a directory"),
        (
            ["kv=4,fsdp=3"],
            "mesh fsdp=3,kv=4: embed of 4096 is not divisible by mesh axes fsdp of 3 devices; "
            "kv_heads of 2 is not divisible by mesh axes kv of 4 devices",
        ),
    ],
)
def test_an_invalid_mesh_or_model_is_refused(capfd, arguments, problem):
    assert error_of(capfd, *arguments).startswith(problem)


# `--mesh`.


@pytest.mark.usefixtures("no_weights")
@pytest.mark.parametrize(
    ("mesh", "words"),
    [
        ("fast", ["'fast'", *PRESETS]),
        ("tp=2", ["tp=2", "data, fsdp, kv, q, seq"]),
        ("latency:0", ["latency:0"]),
        ("kv=4", ["kv_heads of 2", "4 devices"]),
        ("data=4096", ["data=4096 needs 4,096 devices"]),
    ],
)
def test_a_mesh_is_checked_before_weights_are_read(capfd, mesh, words):
    line = refused(capfd, "Hello", "--mesh", mesh)
    for word in words:
        assert word in line


def test_a_quantised_checkpoint_is_counted_as_such(capfd, tmp_path):
    assert glm4v(["convert", "quantize", str(RANDOM_CHECKPOINT), str(tmp_path / "int8"), "--layers", "all"]) == 0
    capfd.readouterr()
    asked = ["mesh", "latency", "--devices", "1", "--json", "--model"]
    assert glm4v([*asked, str(RANDOM_CHECKPOINT), "--quantize", "int8"]) == 0
    expected = json.loads(capfd.readouterr().out)
    assert glm4v([*asked, str(tmp_path / "int8")]) == 0
    captured = capfd.readouterr()
    assert json.loads(captured.out) == expected and "is quantised (8 bits, a scale for each channel)" in captured.err
    error = error_of(capfd, *asked[1:], tmp_path / "int8", "--quantize", "int4")
    assert error.startswith("--quantize: found 'int4' for a checkpoint that is quantised (8 bits")


@pytest.mark.parametrize("command", ["generate", "chat", "describe"])
def test_help_lists_the_presets(capfd, command):
    with pytest.raises(SystemExit):
        glm4v([command, "--help"])
    shown = " ".join(capfd.readouterr().out.replace("│", "").split())
    for name, preset in PRESETS.items():
        assert f"{name}: {preset.description}" in shown


def test_answers_are_the_same_on_every_mesh(run_on_devices):
    save_noise("noise.png")
    prompts = [{"prompt": "What is this?", "image": "noise.png"}, {"prompt": "Hello"}, {"prompt": "And that?"}]
    with open("prompts.jsonl", "w", encoding="utf-8") as file:
        file.writelines(json.dumps(prompt) + "\n" for prompt in prompts)
    answers, batches = run_on_devices(answered)
    assert tuple(answers) == FOR_ONE and tuple(batches) == FOR_MANY
    assert len(answers[None]) > 8 and len(batches[None]) == 3
    for mesh, text in answers.items():
        assert text == answers[None], mesh
    assert batches["throughput:8"] == batches[None]


def run(mesh, *arguments):
    """What a command prints, on one device or in a mesh."""
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        assert glm4v([*arguments, *(() if mesh is None else ("--mesh", mesh))]) == 0
    return out.getvalue()


def answered():
    """What is answered on one device, and on eight in every way."""
    answers = {mesh: run(mesh, *ONE) for mesh in FOR_ONE}
    batches = {}
    for mesh in FOR_MANY:
        run(mesh, *MANY, f"{mesh}.jsonl")
        with open(f"{mesh}.jsonl", encoding="utf-8") as file:
            batches[mesh] = sorted((line["index"], line["text"]) for line in map(json.loads, file))
    return answers, batches
