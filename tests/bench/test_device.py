"""The measurements of an accelerator: every part at tiny size, and what a part does to the others that fails."""

import json
import pathlib
import sys
import time
import tomllib

import pytest

from bench import page
from bench.device import __main__ as device
from bench.device import chart, model, table, train, work, worker
from bench.device.table import Aim, Workload

ROOT = pathlib.Path(__file__).parents[2]

STUB = """
import json, os, sys, time
def reply(**content): print(json.dumps(content), flush=True)
works = {name: ["decode", 8, 8, 1, "", None, False] for name in ("copy", "read", "matrix product, bfloat16", "x")}
reply(machine={"device": "cpu", "tiny": True, "pid": 0}, workloads=works)
for line in sys.stdin:
    part = json.loads(line)["part"]
    if part == "crashes":
        reply(figure={"what": "x", "seconds": 1.0})
        print("CUDA_ERROR_ILLEGAL_ADDRESS", file=sys.stderr, flush=True)
        os.abort()
    if part == "hangs":
        time.sleep(600)
    if part == "raises":
        reply(error="ValueError: no")
        continue
    reply(figure={"what": part, "seconds": 0.5, "note": os.environ["JAX_COMPILATION_CACHE_DIR"]})
    reply(done=True)
"""


@pytest.fixture
def stub(monkeypatch, tmp_path):
    """Run `bench.device` with a worker that measures nothing: (arguments) -> status and results."""
    names = ("crashes", "fine", "hangs", "raises")
    parts = [worker.Part(name, 1, "") for name in names]
    parts += [worker.Part(name, 1, "", in_own_process=True) for name in ("cold start", "warm start")]
    monkeypatch.setattr(device, "PARTS", tuple(parts))
    monkeypatch.setattr(device, "COMMAND", (sys.executable, "-c", STUB))
    monkeypatch.setattr(device, "GRACE", 0)
    monkeypatch.setattr(device, "LEAST", 0)

    def run(*arguments):
        status = device.main(["--tiny", "--out", str(tmp_path), *arguments])
        return status, json.loads((tmp_path / "device.json").read_text())

    return run


def test_a_part_that_fails_is_a_line_and_the_next_is_measured(stub, capsys):
    status, results = stub()
    errors = {name: part["error"] for name, part in results["parts"].items()}
    assert errors == {
        "crashes": "the process ended with status -6: CUDA_ERROR_ILLEGAL_ADDRESS", "fine": None,
        "hangs": "ended after 1 seconds", "raises": "ValueError: no", "cold start": None, "warm start": None,
    }  # fmt: skip
    assert status == 1 and not results["passed"] and "ValueError: no" in capsys.readouterr().out
    assert results["figures"]["x"]["seconds"] == 1.0, "what a part measured before it failed is lost"
    kept = {what: pathlib.Path(one["note"]).name for what, one in results["figures"].items() if "note" in one}
    assert kept == {"fine": "all", "cold start": "start", "warm start": "start"}


@pytest.mark.slow
def test_a_second_run_measures_what_is_missing(stub, monkeypatch):
    stub()
    monkeypatch.setattr(device, "COMMAND", (sys.executable, "-c", STUB.replace('"crashes"', '"no part"')))
    asked = []
    ask = device.Worker.ask
    monkeypatch.setattr(device.Worker, "ask", lambda *given: asked.append(given[1]) or ask(*given))
    stub()
    assert asked == ["crashes", "hangs", "raises"]
    monkeypatch.setattr(device, "COMMAND", (sys.executable, "-c", STUB.replace('"cpu"', '"NVIDIA H200"')))
    with pytest.raises(SystemExit, match=r"device\.json: found figures of device 'cpu'; expected 'NVIDIA H200'"):
        stub("--only", "fine")
    status, results = stub("--only", "fine", "--restart")
    assert status == 0 and set(results["parts"]) == {"fine"}


def test_facts_that_another_version_does_not_record(stub, monkeypatch):
    stub("--only", "fine")
    monkeypatch.setattr(device, "COMMAND", (sys.executable, "-c", STUB.replace('"pid": 0', '"pid": 0, "memory": None')))
    status, _ = stub("--only", "fine")
    assert status == 0
    monkeypatch.setattr(device, "COMMAND", (sys.executable, "-c", STUB.replace(', "pid": 0', "")))
    with pytest.raises(SystemExit, match=r"found figures of pid 0; expected None: pass --restart"):
        stub("--only", "fine")


def test_a_part_that_ends_between_two_figures_is_measured_again(stub, monkeypatch):
    cut = STUB.replace("works = {", 'works = {"later": ["fine", 8, 8, 1, "", None, False]} | {')
    cut = cut.replace("works = {", 'works = {"fine": ["fine", 8, 8, 1, "", None, False]} | {', 1)
    monkeypatch.setattr(device, "COMMAND", (sys.executable, "-c", cut))
    status, results = stub("--only", "fine")
    assert results["parts"]["fine"]["error"] == "no time left for later" and status == 1
    assert results["figures"]["fine"]["seconds"] == 0.5
    whole = cut.replace("reply(done=True)", 'reply(figure={"what": "later", "seconds": 1.0}); reply(done=True)')
    monkeypatch.setattr(device, "COMMAND", (sys.executable, "-c", whole))
    status, results = stub("--only", "fine")
    assert results["parts"]["fine"]["error"] is None and status == 0


def test_no_part_begins_after_the_time(stub):
    status, results = stub("--seconds", "-1")
    assert status == 1
    assert {part["error"] for part in results["parts"].values()} == {"not begun: no time left"}


def test_an_unknown_part_is_an_error(stub, capsys):
    with pytest.raises(SystemExit):
        stub("--only", "fine,decoding")
    assert "--only: found 'decoding'; expected one of crashes, fine" in capsys.readouterr().err


def results_of(kind, seconds, work, tiny=False, name="it"):
    """Results of a device that copies 4 TB/s and computes 800 TFLOP/s, with a figure of `name`."""
    ceilings = {
        "copy": Workload("ceilings", 8e12, 0), "read": Workload("ceilings", 3e12, 0),
        "matrix product, bfloat16": Workload("ceilings", 0, 8e14),
    }  # fmt: skip
    figures = {"copy": 2.0, "read": 1.0, "matrix product, bfloat16": 1.0, name: seconds}
    content = {
        "machine": {"device": kind, "tiny": tiny}, "workloads": ceilings | {name: work},
        "figures": {what: {"part": what, "seconds": value} for what, value in figures.items()},
    }  # fmt: skip
    return json.loads(json.dumps(content))


def requests_on(chip):
    return Workload("it", 4e9, 8e11, 1, "requests", Aim("per second", 12, chip), is_serial=True)


@pytest.mark.parametrize(
    ("work", "seconds", "of_floor", "of_peak", "passed"),
    [
        (Workload("it", 4.8e9, 1e9, aim=Aim("bandwidth", 0.83)), 1.25e-3, 0.96, 0.8, False),
        (Workload("it", 4.8e9, 1e9, aim=Aim("bandwidth", 0.83)), 1.2e-3, 1.0, 0.8333, True),
        (Workload("it", 1e6, 989e9, aim=Aim("matmul", 0.45)), 2.7e-3, 0.4579, 0.3704, True),
        (Workload("it", 0, 989e9, aim=Aim("FLOP/s", 0.45)), 2.5e-3, 0.4945, 0.4, False),
        (requests_on("NVIDIA H200"), 0.08, 0.025, 0.02053, True),
        (requests_on("NVIDIA H100"), 0.1, 0.02, 0.01642, None),
    ],
)
def test_floors_and_aims(work, seconds, of_floor, of_peak, passed):
    line = {line.what: line for line in table.lines(results_of("NVIDIA H200", seconds, work))}["it"]
    assert (line.of_floor, line.of_peak) == pytest.approx((of_floor, of_peak), rel=1e-3)
    assert line.passed is passed


def test_a_tiny_run_is_not_judged_by_aims():
    work = Workload("it", 4.8e9, 0, aim=Aim("bandwidth", 0.83))
    assert "FAIL" in str(table.tables(results_of("NVIDIA H200", 1, work))[0].rows)
    assert "FAIL" not in str(table.tables(results_of("NVIDIA H200", 1, work, tiny=True))[0].rows)


def test_the_chart_is_what_its_program_draws():
    assert chart.CHART.read_text(encoding="utf-8") == chart.chart()


def test_a_page_of_results_has_figures_in_the_places_of_words(monkeypatch, tmp_path):
    name = "decode, B = 1"
    results = results_of("NVIDIA H200", 4.2e-3, work.workloads(tiny=False)[name], name=name)
    results["machine"] |= {"jax": "0.11.2", "python": "3.12.3", "platform_version": "cuda 13000"}
    results["parts"] = {"int8": {"seconds": 1.0, "error": "ended after 120 seconds"}}
    path = tmp_path / "device.json"
    path.write_text(json.dumps(results))
    assert "not measured yet" in chart.chart() and "Nothing here is measured yet" in page.page("device")
    monkeypatch.setattr(chart, "RESULTS", path)
    text = page.page("device")
    assert "Measured on one NVIDIA H200 with jax 0.11.2" in text and "- int8: ended after 120 seconds" in text
    assert "| decode, B = 1 | 4.2 | 238 tokens/s | 4.43 | 106% | 88% | 83% of bandwidth | pass |" in text
    assert ">88% (aim 83%)<" in chart.chart()


@pytest.mark.parametrize(("memory", "tried"), [(80e9, ["attention", "full"]), (141e9, ["none", "attention", "full"])])
def test_a_step_that_runs_out_of_memory_recomputes_more(monkeypatch, memory, tried):
    monkeypatch.setattr(train, "device_memory", lambda device: memory)
    ways = []

    def measure(remat):
        ways.append(remat)
        if remat != "full":
            raise RuntimeError("RESOURCE_EXHAUSTED: Out of memory while trying to allocate 9 bytes.")
        return {"seconds": 1.0}

    assert train._with_memory("it", measure) == {"what": "it", "seconds": 1.0, "note": "remat full"}
    assert ways == tried


@pytest.mark.slow
def test_the_smallest_run_needs_no_packages_but_those_that_are_carried(tmp_path, monkeypatch):
    """Those of `make device-wheels`, and JAX's own; the modules of all parts are imported."""
    there = {"jax", "flax", "optax", "orbax-checkpoint", "safetensors", "tokenizers"}
    there |= {"numpy", "ml_dtypes", "tensorstore", "filelock", "huggingface_hub", "idna", "rich"}  # which these bring
    makefile = (ROOT / "Makefile").read_text()
    there |= set(next(line for line in makefile.splitlines() if line.startswith("DEVICE_WHEELS = ")).split()[2:])
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    needed = {dependency.partition(";")[0].split(">")[0].strip() for dependency in project["dependencies"]}
    missing = [name.replace("-", "_") for name in needed - there]
    assert {"tyro", "decord", "urllib3"} <= set(missing)
    assert device.COMMAND[:-1] == (sys.executable, "-m")
    code = f"import runpy, sys; sys.modules.update(dict.fromkeys({missing!r}))\n"
    code += "from bench.device import __main__, generate, kernels, train\n"
    code += f"runpy.run_module({device.COMMAND[-1]!r}, run_name='__main__')"
    monkeypatch.setattr(device, "COMMAND", (sys.executable, "-c", code))
    monkeypatch.setattr(device, "START", 900)
    assert device.main(["--tiny", "--only", "ceilings", "--out", str(tmp_path)]) == 0
    results = json.loads((tmp_path / "device.json").read_text())
    assert results["machine"]["platform"] == "cpu" and results["machine"]["tiny"]
    works = work.workloads(tiny=True)
    assert set(results["figures"]) == {what for what, one in works.items() if one.part == "ceilings"}


@pytest.mark.slow
def test_every_part_measures_what_it_should_at_tiny_size(monkeypatch):
    """In one process, so that parts share programs; `test_a_part_that_fails_...` has the processes."""
    monkeypatch.setattr(model, "MAX_SECONDS", 0.0)  # one run is timed
    tiny, figures = model.Device(tiny=True, started=time.time()), {}
    works = work.workloads(tiny=True)
    for part in worker.PARTS:
        found = list(worker.measure(part.where, tiny))
        assert found, part.name
        assert {what for what, one in works.items() if one.part == part.name} <= {one["what"] for one in found}
        figures |= {part.name if one["what"] == "start" else one["what"]: one for one in found}
    failed = {what: one["error"] for what, one in figures.items() if "error" in one}
    assert not failed
    assert set(works) <= set(figures)
    assert all(one["seconds"] > 0 for what, one in figures.items() if not what.startswith("profile"))
    assert all(one["passed"] for what, one in figures.items() if what.startswith(("attention", "training")))
    assert "3 of 3 requests" in figures["requests"]["note"]
