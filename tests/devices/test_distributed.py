"""Several processes as one program: the same text, and one end for all.

Run as a program, `python test_distributed.py PART PORT PROCESSES INDEX ...`, this file is one of the processes.
"""

import contextlib
import json
import signal
import socket
import sys
import time
from pathlib import Path

import pytest
from helpers_checkpoints import RANDOM_CHECKPOINT
from helpers_cli import save_noise
from helpers_orbax import assert_same_weights, free_port
from helpers_processes import ForkedProgram

from glm4v_jax.cli import main
from glm4v_jax.devices import distributed
from glm4v_jax.errors import ConfigError, DataError, Glm4vError

ASKED = ["--greedy", "--image", "noise.png", "--max-new-tokens", "12", "What is it?"]
OF_A_FILE = ["generate", "--jsonl", "rows.jsonl", "--max-new-tokens", "9", "--slots", "4"]
ENDLESS = ["--max-new-tokens", "20000", "What is it?"]


@pytest.fixture(autouse=True)
def _in_a_directory(tmp_path, monkeypatch):
    """With an image."""
    monkeypatch.chdir(tmp_path)
    save_noise("noise.png")


@contextlib.contextmanager
def running(*commands, directories=(".", ".", ".")):
    """Processes of these commands, one each, which end with the block at the latest."""
    started = []
    try:
        for command, directory in zip(commands, directories, strict=False):
            started.append(ForkedProgram(command, cwd=directory))
        yield started
    finally:
        for process in started:
            process.kill()
            process.wait()
            process.stdout.close()
            process.stderr.close()


def ended(processes, timeout=60):
    """Exit status, standard output and lines of standard error of each."""
    deadline = time.monotonic() + timeout
    found = []
    for process in processes:
        out, errors = process.communicate(timeout=max(1, deadline - time.monotonic()))
        found.append((process.returncode, out.decode(), errors.decode().splitlines()))
    return found


def generate(number, *arguments):
    """The commands of `number` processes; `arguments` may be one list for each."""
    port = free_port()
    each = arguments if arguments and isinstance(arguments[0], list) else [list(arguments)] * number
    where = ["--coordinator", f"127.0.0.1:{port}", "--num-processes", number, "--process-id"]
    return [["-m", "glm4v_jax", "generate", *own, *where, i] for i, own in enumerate(each)]


def parts(part, number, *arguments):
    """The commands of `number` processes of this file."""
    port = free_port()
    return [[__file__, part, port, number, i, *arguments] for i in range(number)]


def test_three_processes_print_what_one_prints(capfd):
    assert main.main(["generate", *ASKED]) == 0
    alone = capfd.readouterr().out
    with running(*generate(3, *ASKED)) as processes:
        (status, out, errors), *others = ended(processes, 120)
    assert (status, out) == (0, alone), errors
    assert errors[-1].startswith("24 prompt tokens, 12 new")
    assert others == [(0, "", [])] * 2


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """Two processes that convert a checkpoint, do what `share` does, and then answer a file of prompts.

    The directory, and what each has come to; see `ended`.
    """
    directory = tmp_path_factory.mktemp("pair")
    rows = [{"prompt": f"What is {n}?", "id": n} for n in range(3)]
    rows += [{"prompt": "And this?", "image": "noise.png"}, {"prompt": "This?", "image": "broken.png"}]
    rows += [{"prompt": "Draw", "do_sample": True, "temperature": 1.0, "seed": 5}]
    rows += [{"prompt": "Is it?", "choices": ["yes", "no"], "think_budget": 4, "answer_budget": 4}]
    save_noise(directory / "noise.png")
    (directory / "broken.png").write_text("not an image")
    (directory / "rows.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    with running(*parts("pair", 2, *OF_A_FILE, "--out", "two.jsonl"), directories=[directory] * 2) as processes:
        return directory, ended(processes, 180)


def test_several_processes_answer_a_file_of_prompts_as_one_does(pair, monkeypatch, capfd):
    directory, [(status, out, errors), (other, other_out, other_errors)] = pair
    failed = "1 of 7 prompts failed; see 'error' in two.jsonl"
    assert errors[-1] == f"glm4v: error: {failed}"
    assert other_errors == [f"glm4v: error: process 0: {failed}"]
    assert (status, other, other_out) == (1, 1, "")
    assert [line.partition(":")[0] for line in out.splitlines()] == ["together"]  # of the conversion; of answers, none
    monkeypatch.chdir(directory)
    assert main.main([*OF_A_FILE, "--out", "one.jsonl"]) == 1
    capfd.readouterr()
    one, two = (sorted(Path(name).read_text().splitlines()) for name in ("one.jsonl", "two.jsonl"))
    assert one == two and len(two) == 7


def test_several_processes_convert_a_checkpoint_together(pair):
    directory, [(_, out, errors), (_, other_out, _)] = pair
    reports = [json.loads((directory / f"{i}.json").read_text()) for i in range(2)]
    assert [report["converted"] for report in reports] == [0, 0], errors
    assert out.startswith("together: ") and other_out == ""
    assert_same_weights(directory / "together", RANDOM_CHECKPOINT, ordered=False)


def test_each_process_reads_its_shards_and_gathers_whole_arrays(pair):
    directory, [(_, _, errors), _] = pair
    for i in range(2):
        report = json.loads((directory / f"{i}.json").read_text())
        assert report["whole"] == list(range(8)), errors
        assert report["agreed"] == [None, "broken (in process 1)"]
        of_another = " (in process 1)" if i == 0 else ""
        assert report["raised"] == [f"DataError: a.jsonl:2: broken{of_another}"]
        assert len(report["shares"]) == 2
        for share in report["shares"]:
            assert share["read"] == share["held"] < 0.55 * share["nbytes"]
        assert report["found"] == 1  # compiled again, a program is one that the first process keeps: see sitecustomize


def test_a_killed_process_ends_the_others():
    with running(*generate(2, *ENDLESS)) as processes:
        assert processes[0].stdout.read1(1)
        processes[1].send_signal(signal.SIGKILL)
        (status, _, errors), (killed, _, _) = ended(processes)
    assert killed == -signal.SIGKILL
    assert status != 0
    assert errors[-1].startswith("glm4v: error: a computation failed, perhaps because another process is gone: ")


def test_the_first_process_killed_ends_the_others():
    """Whatever they do: JAX's native code ends them."""
    with running(*parts("wait", 2)) as processes:
        assert processes[0].stdout.readline() == b"joined\n"
        processes[0].send_signal(signal.SIGKILL)
        (killed, _, _), (status, _, errors) = ended(processes)
    assert killed == -signal.SIGKILL
    assert status != 0
    assert "JAX distributed service detected fatal errors" in "".join(errors)


def test_a_process_without_heartbeats_ends_the_others():
    with running(*parts("wait", 2)) as processes:
        assert processes[0].stdout.readline() == b"joined\n"
        processes[1].send_signal(signal.SIGSTOP)
        ((status, _, errors),) = ended(processes[:1])
    assert status != 0
    assert "stopped sending heartbeats" in "".join(errors)


def test_an_interrupt_of_one_process_ends_all():
    with running(*generate(2, *ENDLESS)) as processes:
        assert processes[0].stdout.read1(1)
        processes[1].send_signal(signal.SIGINT)
        (status, _, errors), interrupted = ended(processes)
    assert (status, errors[-1]) == (1, "glm4v: error: process 1: interrupted")
    assert interrupted == (130, "", ["glm4v: error: interrupted"])


def test_an_error_in_one_process_ends_all(tmp_path):
    (tmp_path / "elsewhere").mkdir()
    with running(*generate(2, *ASKED), directories=(".", "elsewhere")) as processes:
        found = ended(processes)
    missing = "--image: found noise.png, no such file; expected an image or a video"
    assert [status for status, _, _ in found] == [1, 1]
    assert [out for _, out, _ in found] == ["", ""]
    assert found[0][2][-1] == f"glm4v: error: process 1: {missing}"
    assert found[1][2] == [f"glm4v: error: {missing}"]


def test_different_prompts_are_refused():
    with running(*generate(2, ["What is it?"], ["Where is it?"])) as processes:
        found = ended(processes)
    assert [(status, out) for status, out, _ in found] == [(1, "")] * 2
    said = "prompt 0: found another in process 1 than in process 0; expected the same in all processes"
    assert found[0][2][-1] == f"glm4v: error: {said}"


def test_different_numbers_of_processes_are_refused():
    first, second = generate(2, "What is it?")
    second[second.index(2)] = 3
    with running(first, second) as processes:
        found = ended(processes)
    assert [status for status, _, _ in found] == [1, 1]
    assert found[1][2] == ["glm4v: error: num_processes: found 3; expected 2, as process 0 was started with"]


def test_a_mesh_without_some_process_is_refused():
    with running(*generate(2, "--mesh", "kv=1", "What is it?")) as processes:
        found = ended(processes)
    said = (
        "mesh of one device: found no device of process 1; expected some of each of 2 processes, which have 2 devices"
    )
    assert found[0][0] == 1 and found[0][2][-1] == f"glm4v: error: {said}"


def test_an_uncaught_exception_ends_all():
    with running(*parts("raise", 2)) as processes:
        (status, _, errors), (other, _, traceback) = ended(processes)
    assert (status, other) == (1, 1)
    assert errors == ["error: process 1: RuntimeError: broken here"]
    assert traceback[-1] == "RuntimeError: broken here"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("127.0.0.1:1234", 2, 2), "process_id: found 2; expected 0 to 1, for num_processes=2"),
        (("127.0.0.1:1234", 2, -1), "process_id: found -1; expected 0 to 1, for num_processes=2"),
        (("127.0.0.1:1234", 0, 0), "num_processes: found 0; expected at least 1"),
        (("127.0.0.1", 2, 0), "coordinator: found '127.0.0.1'; expected HOST:PORT"),
        (("127.0.0.1:http", 2, 0), "coordinator: found '127.0.0.1:http'; expected HOST:PORT"),
        ((None, 2, 0), "coordinator: found nothing; expected coordinator"),
        (("127.0.0.1:1234", None, None), "num_processes, process_id: found nothing; expected coordinator"),
    ],
)
def test_contradictory_arguments_are_refused(arguments, message):
    with pytest.raises(ConfigError, match=f"^{message}"):
        distributed.init_distributed(*arguments)


def test_jax_must_not_be_in_use(mesh):
    with pytest.raises(ConfigError, match="must be called before any JAX calls"):
        distributed.init_distributed("127.0.0.1:1234", 2, 0)


@pytest.mark.usefixtures("mesh")
def test_a_single_process_joins_nobody():
    assert not distributed.init_distributed()
    assert not distributed.init_distributed(num_processes=1)
    assert distributed.is_first() and not distributed.several() and not distributed.has_joined()
    assert distributed.agree("prompt", b"x") is None
    assert distributed.agree("prompt", error="broken") == "broken"


def test_an_absent_coordinator_is_reported():
    port = free_port()
    with running(*([__file__, "late", port, 2, 1],)) as processes:
        ((status, out, _),) = ended(processes)
    assert status == 0
    assert out.startswith(f"coordinator: found nobody at 127.0.0.1:{port} for 1 s (")


def test_a_taken_port_is_reported():
    with socket.create_server(("", 0)) as taken:
        port = taken.getsockname()[1]
        with running(*([__file__, "late", port, 2, 0],)) as processes:
            ((status, out, _),) = ended(processes)
    assert status == 0
    assert out.startswith(f"coordinator: found port {port} in use (Address already in use")


def test_a_missing_process_is_reported():
    port = free_port()
    with running(*([__file__, "few", port, 3, i] for i in range(2))) as processes:
        found = ended(processes)
    for status, _, errors in found:
        assert status != 0
        assert "RegisterTask" in "".join(errors)  # in JAX's native words


def test_chat_is_for_one_process(monkeypatch, capfd):
    monkeypatch.setenv("SLURM_PROCID", "1")
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "4")
    assert main.main(["chat"]) == 1
    assert "chat: found one of several processes, of Slurm; expected the only one" in capfd.readouterr().err


def wait(*where):
    """Until somebody ends it."""
    from glm4v_jax.console.distributed import DistributedOptions, joined

    distributed.HEARTBEAT_SECONDS = 5
    with joined(options(DistributedOptions, *where), "glm4v"):
        print("joined", flush=True)  # noqa: T201
        time.sleep(100)


def few(*where):
    """Wait for a process that does not come, for a short time."""
    from glm4v_jax.console.distributed import DistributedOptions, joined

    distributed.init_distributed.__kwdefaults__["timeout"] = 3
    with joined(options(DistributedOptions, *where), "glm4v"):
        pass


def late(*where):
    """Print why joining does not work."""
    try:
        distributed.init_distributed(*address(*where), timeout=1)
    except ConfigError as error:
        print(error)  # noqa: T201


def raise_(*where):
    distributed.init_distributed(*address(*where))
    if where[2] == "1":
        raise RuntimeError("broken here")
    time.sleep(100)


def pair_(port, processes, index, *arguments):
    """Run `glm4v`; once the processes have joined, they convert a checkpoint and `share` first."""
    from glm4v_jax.__main__ import program
    from glm4v_jax.cli.generate import Generate

    run = Generate.run

    def convert_share_and_run(command):
        converted = main.main(["convert", "to-orbax", str(RANDOM_CHECKPOINT), "together"])
        report = {"converted": converted} | share(index, RANDOM_CHECKPOINT, "together")
        Path(f"{index}.json").write_text(json.dumps(report))
        run(command)

    Generate.run = convert_share_and_run
    where = ["--coordinator", f"127.0.0.1:{port}", "--num-processes", processes, "--process-id", index]
    sys.argv[1:] = [*arguments, *where]
    program()


def share(index, *directories):
    """What of each checkpoint is read here, an array that both hold a half of, and what `agree` says."""
    import functools

    import jax
    import numpy as np

    from glm4v_jax import Glm4vForConditionalGeneration
    from glm4v_jax.checkpoints import load
    from glm4v_jax.devices.mesh import make_mesh, use_mesh

    read, whole = [], load.array_of
    load.array_of = functools.partial(whole, count=read.append)
    mesh, shares = make_mesh(fsdp=2), []
    for directory in directories:
        read.clear()
        model = Glm4vForConditionalGeneration.from_pretrained(directory, mesh=mesh, dtype="auto")
        arrays = jax.tree.leaves(model.module)
        held = sum(array.addressable_shards[0].data.nbytes for array in arrays)
        shares.append({"read": sum(read), "held": held, "nbytes": sum(array.nbytes for array in arrays)})
    load.array_of = whole
    with use_mesh(mesh):
        split = jax.device_put(np.arange(8), jax.NamedSharding(mesh, jax.P("fsdp")))
    assert not split.is_fully_addressable
    agreed = [distributed.agree("it", b"same"), distributed.agree("it", error="broken" if index == "1" else None)]
    raised = []
    for process in (None, "1"):
        try:
            with distributed.errors_of_all():
                if index == process:
                    raise DataError("a.jsonl:2: broken")
        except Glm4vError as error:
            raised.append(f"{type(error).__name__}: {error}")
    gathered = distributed.to_host({"x": split})["x"].tolist()
    distributed.agree("it", b"gathered")  # by the first process too, which keeps the program
    jax.clear_caches()
    events = []
    jax.monitoring.register_event_listener(lambda event, **_: events.append(event))
    assert distributed.to_host({"x": split})["x"].tolist() == gathered
    found = events.count("/jax/compilation_cache/cache_hits")
    return {"shares": shares, "whole": gathered, "agreed": agreed, "raised": raised, "found": found}


def address(port, processes, index):
    return f"127.0.0.1:{port}", int(processes), int(index)


def options(kind, *where):
    coordinator, processes, index = address(*where)
    return kind(coordinator=coordinator, num_processes=processes, process_id=index)


if __name__ == "__main__":
    {"wait": wait, "few": few, "late": late, "raise": raise_, "pair": pair_}[sys.argv[1]](*sys.argv[2:])
