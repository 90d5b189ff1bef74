"""The other measurements at tiny sizes."""

import dataclasses
import subprocess
import sys

import jax
import numpy as np
import pytest
from helpers_paths import ROOT
from helpers_transformers import import_transformers

from bench import (
    aot,
    aot_train,
    aot_vllm,
    convert,
    engine,
    grammar,
    growth,
    install,
    lmms_eval,
    memory,
    models,
    ocr,
    page,
    preprocess,
    prompt_lookup,
    quant,
    quant_quality,
    recompile,
    rl,
    serve,
    serve_soak,
)
from bench import eval as evaluation
from bench.device import __main__ as device
from convert.synth import load_config
from glm4v_jax import Engine, Glm4vForConditionalGeneration, Glm4vProcessor
from glm4v_jax.checkpoints.hf_write import tensor_shapes
from glm4v_jax.checkpoints.load import load_runtime
from glm4v_jax.tiny import TINY_CHECKPOINT

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("stacked_layers")]


@pytest.mark.parametrize(
    "module",
    [
        aot,
        aot_vllm,
        convert,
        device,
        engine,
        evaluation,
        grammar,
        growth,
        install,
        lmms_eval,
        memory,
        ocr,
        preprocess,
        prompt_lookup,
        quant,
        quant_quality,
        recompile,
        rl,
        serve,
        serve_soak,
    ],
)
def test_help_measures_nothing(module, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["it", "--help"])
    with pytest.raises(SystemExit) as ended:
        module.main()
    assert ended.value.code == 0 and "usage: python -m bench." in capsys.readouterr().out


def test_aot_has_a_table_for_inference_and_one_for_training():
    compiled = {
        "program": "full, 4 x 8,192", "topology": "v5e:2x4", "mesh": {"fsdp": 4, "kv": 2}, "seconds": 61.2,
        "arguments": 7.5, "temporaries": 5.25, "peak": 11.5, "hbm": 16, "received": 40.0, "megacycles": 1500,
        "collectives": {"all-gather": [12, 2], "all-reduce": [0, 3]}, "beside": 4.25,
    }  # fmt: skip
    counts = {
        "model_flops": 8 * 197e12, "recomputed_flops": 8 * 65e12, "dot_flops": 0.0, "least_sent": 20e9,
        "kernels": {"splash_mha_fwd_segmented_residuals": 80, "splash_mha_dq": 40}, "kernel_flops": 8 * 19.7e12,
    }  # fmt: skip
    line = aot_train.finished(compiled, counts)
    assert not aot_train.finished(compiled | {"beside": 4.75}, counts)["fits"]
    inference, training = aot.tables({"programs": [line | {"passed": True}]})
    assert not inference.rows and len(training.rows) == 1 and len(training.rows[0]) == len(training.columns)
    cells = dict(zip(training.columns, training.rows[0], strict=True))
    # A second of a v5e's products, longer than a tenth of one on its links and than reading and writing the state.
    assert (
        line["fits"]
        and cells["beside"] == "4.25"
        and cells["mesh"] == "fsdp=4 kv=2"
        and cells["floor ms"] == "1000 (FLOP/s)"
    )
    assert cells["estimated ms"] == "1300"  # cycles, links, attention kernels


@pytest.fixture(scope="module")
def packaged():
    model = Glm4vForConditionalGeneration.from_pretrained(TINY_CHECKPOINT, stacked=True)
    return model, Glm4vProcessor.from_pretrained(TINY_CHECKPOINT)


@pytest.fixture(scope="module")
def sides():
    import_transformers()
    sides = {"ours": evaluation.Ours(), "theirs": evaluation.Theirs()}
    for side in sides.values():
        side.load(directory=str(TINY_CHECKPOINT), batch=2)
    return {name: lambda task, side=side, **of: getattr(side, task)(**of) for name, side in sides.items()}


def test_evaluations_give_the_same_answers(sides):
    lines = evaluation.compare(sides, rounds=1, count=3)
    assert [(line["task"], line["items"], line["same_answers"]) for line in lines] == [
        (task, 3, 3) for task in evaluation.TASKS
    ]
    assert all(line[side]["median"] > 0 for line in lines for side in sides)
    assert len(evaluation.tables({"lines": lines, "batch": 2, "machine": {"ours": {"cores": 2}}})[0].rows) == 2


@pytest.mark.parametrize("kind", ["one size", "files"])
def test_photographs_have_the_patches_of_the_reference(kind):
    found = [side().images(kind, 2) for side in (preprocess.Ours, preprocess.Theirs)]
    assert found[0]["digest"] == found[1]["digest"] and all(one["seconds"] > 0 for one in found)


def test_a_stream_prepares_batches_beside_steps():
    ours = preprocess.Ours()
    found = ours.overlap(batches=1)
    assert min(found.values()) > 0 and found["both"] >= found["step"]
    frames = [ours.decode(decoder)["amount"] for decoder in ("ours", "decord", "PyAV")]
    assert len(set(frames)) == 1 and frames[0] > 100
    assert ours.scaled("threads", 2, 2)["amount"] == 2


def test_prompt_lookup_copies_what_a_prompt_holds(tmp_path):
    config = models.SHALLOW
    order = np.random.default_rng(0).permutation(config["text_config"]["vocab_size"])
    successors = np.empty_like(order)
    successors[order] = np.roll(order, -1)
    path = models.write_checkpoint(tmp_path / "copying", config, successors=successors)
    runtime = load_runtime(path, stacked=True)
    copy, edited, nothing = prompt_lookup.compare(runtime, successors, new_tokens=40, rounds=1)
    assert copy["tokens_equal"] and edited["tokens_equal"] and nothing["tokens_equal"]
    assert (copy["copied_tokens"], nothing["tokens_per_step"]) == (40, 1.0)
    assert 1.0 < edited["tokens_per_step"] < copy["tokens_per_step"] <= 8


def test_checkpoints_with_the_packaged_processor_have_the_ids_of_its_tokenizer(tmp_path):
    config = models.SHALLOW | {name: number for name, number in models.INFERENCE.items() if name.endswith("token_id")}
    assert config["image_token_id"] != models.PACKAGED["image_token_id"]
    path = models.write_checkpoint(tmp_path, config, processor=True)
    Glm4vProcessor.from_pretrained(path).check_ids(load_config(str(path / "config.json")))


def test_a_prompt_is_prefilled_whole_though_it_was_seen_before(packaged, monkeypatch):
    monkeypatch.setattr(quant, "PREFILL_TOKENS", 20)
    variant = quant.Variant("float32", 1)
    variant._runtime = packaged[0].runtime
    for _ in range(2):
        assert variant.prefill() > 0
    assert variant._slots.stats.reused_tokens == 0


def test_the_server_answers_what_is_measured(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["it", "--quick"])
    assert serve.main() == 0


def test_evaluations_with_other_answers_fail(sides):
    def theirs(task, **arguments):
        found = sides["theirs"](task, **arguments)
        return found | {"texts": ["", *found["texts"][1:]], "seconds": 1e3}

    line, _ = evaluation.compare(sides | {"theirs": theirs}, rounds=1, count=3)
    assert line["same_answers"] == 2 and line["ratio"]["median"] > evaluation.AIM and not line["passed"]


def test_an_answer_ends_with_its_tag():
    shown, hidden = "<think>Hm.</think><answer>\n3 </answer>\n<|user|>", "<think>Hm.</think><answer>\n3 "
    assert evaluation.answer_of(shown) == evaluation.answer_of(hidden) == "<think>Hm.</think><answer>\n3"


def test_the_engine_and_the_program_alone_take_time_for_a_step(packaged, monkeypatch):
    monkeypatch.setattr(engine, "STEPS", 2 * engine.MAX_STEPS + 1)
    loaded = Engine(*packaged, num_slots=2, capacity=engine.CAPACITY)
    engine.engine_step(loaded, 2)  # compiles
    assert np.isfinite(engine.engine_step(loaded, 2)) and engine.bare_step(loaded, 2) > 0


@pytest.mark.parametrize("gigabytes", [1, 4, 4.7, 10, 20.585554944, 100])
def test_a_checkpoint_to_convert_is_as_large_as_asked_for(gigabytes):
    shapes = tensor_shapes(convert.model_config(gigabytes)).values()
    size = sum(2 * int(np.prod(shape)) for shape in shapes)
    assert size >= min(gigabytes * 1e9, 20_585_554_944)
    assert size < gigabytes * 1e9 + convert.LAYER_BYTES or gigabytes < 5


def test_conversions_are_measured_both_ways(tmp_path):
    figures = convert.run(load_config("tiny"), tmp_path)
    assert figures["tensor_bytes"] == 2_688_192 and figures["parameters"] == 1_344_096
    assert [each["direction"] for each in figures["directions"]] == ["to-orbax", "to-hf"]
    assert all(each["ratio"] > 0 and each["peak_bytes"] > 0 for each in figures["directions"])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["back", "config.json", "orbax"]
    assert len(convert.tables(figures)[0].rows) == 3


def test_memory_of_a_conversion_is_its_own(tmp_path):
    command = [sys.executable, "-c", "x = b'1' * (300 << 20)"]
    assert 300 << 20 < convert.measure(command, tmp_path, tmp_path)["peak_bytes"] < 350 << 20
    assert convert.measure([sys.executable, "-c", ""], tmp_path, tmp_path)["peak_bytes"] < 50 << 20


@pytest.mark.parametrize(("sizes", "increments", "exponent"), [
    ((1, 2, 4), (7, 14, 28), 1), ((1, 2, 4), (7, 28, 112), 2), ((1.5, 2.5, 4.5), (7, 14, 28), 1),
])  # fmt: skip
def test_growth_is_linear_or_quadratic(sizes, increments, exponent):
    baseline = sizes[0] - 1
    assert memory.growth_exponent(sizes, increments, baseline) == pytest.approx(exponent)


def test_a_small_quadratic_part_is_too_much():
    sizes = np.array([1000, 2000, 4000])
    assert memory.growth_exponent(sizes, sizes + sizes**2 / 7000) > memory.MAX_EXPONENT


@pytest.mark.parametrize("task", ["image", "prompt", "gradient"])
def test_a_task_of_memory_prints_its_peak(task, monkeypatch, capsys):
    if task != "prompt":
        shallow = dataclasses.replace(memory.vision_config(), depth=1)
        monkeypatch.setattr(memory, "vision_config", lambda: shallow)
    monkeypatch.setattr(sys, "argv", ["memory", "--task", task, "--size", "1024"])
    assert memory.main() == 0
    assert int(capsys.readouterr().out) > 50_000_000


def test_peak_memory_counts_what_was_touched():
    """In a process of its own: the peak of this one is gigabytes, which another array would have to exceed."""
    code = (
        "from bench import turns; import numpy as np; before = turns.peak_bytes();"
        "held = np.ones(before + 50_000_000, np.uint8); print(turns.peak_bytes() - before)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert int(done.stdout) >= 50_000_000


def test_a_request_seen_before_compiles_nothing(packaged):
    heard = recompile.Compilations()
    first, again = (recompile.send(*packaged, np.random.default_rng(30), heard) for _ in range(2))
    assert again.compiled == []
    assert dataclasses.replace(first, seconds=0, compiled=[]) == dataclasses.replace(again, seconds=0)
    assert 0 < first.prompt_tokens <= first.prompt_bucket and 0 <= first.patches <= first.row_patches


def test_a_compilation_is_counted(packaged, monkeypatch):
    def careless(input_ids, **_):
        jax.jit(lambda x: x * 3 + 1)(input_ids)

    monkeypatch.setattr(packaged[0], "generate", careless)
    assert len(recompile.send(*packaged, np.random.default_rng(30), recompile.Compilations()).compiled) == 1


def test_requests_are_mixed():
    rng = np.random.default_rng(0)
    kinds = [[item["type"] for item in recompile.random_messages(rng)[0][0]["content"]] for _ in range(40)]
    assert {types.count("image") for types in kinds} == {0, 1, 2, 3, 4}
    assert {types.count("video") for types in kinds} == {0, 1}
    assert any("image" in types and "video" in types for types in kinds)


def test_lmms_eval_is_given_a_task_of_local_files(tmp_path):
    lmms_eval.write_task(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"items.parquet", "digits_local.yaml", "utils.py"}


def test_the_page_of_an_installation_without_another_checkout_is_written(monkeypatch):
    read = page.read

    def read_alone(name):
        found = read(name)
        if name == "install":
            found["starts"] = {start: one for start, one in found["starts"].items() if start.startswith("this")}
        return found

    assert "traced its programs at every start" in page.page("performance")
    monkeypatch.setattr(page, "read", read_alone)
    assert "traced its programs at every start" not in page.page("performance")
