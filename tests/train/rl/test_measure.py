"""Pass rates before a training: each problem once, whatever was interrupted."""

import dataclasses
import json
import pathlib

import pytest

from glm4v_jax.config.model import Glm4vConfig
from glm4v_jax.errors import DataError
from glm4v_jax.generate.completion import Completion
from glm4v_jax.generate.text.thinking import BOX, END_BOX
from glm4v_jax.tiny import TINY_CHECKPOINT
from train.commands import main
from train.rl.config import RLConfig, SamplingConfig, VerifierConfig
from train.rl.judging import Judges
from train.rl.levels import Levels
from train.rl.measure import measure
from train.rl.problems import read_problems
from train.rl.rollouts import sampling_options, seed_of
from train.rl.verifiers import make_verifiers

CONFIGS = {"it": VerifierConfig(kind="counting")}
VERIFIERS = make_verifiers(CONFIGS)


class Scripted:
    """Answers number j of every four with j, the last ones first; stops in the middle where told to."""

    def __init__(self, stop_after=None):
        self.stop_after, self.asked = stop_after, []

    def generate_many(self, prompts, *, samples, **options):
        assert options["top_k"] == 0 and options["repetition_penalty"] == 1.0
        self.asked = list(prompts)
        for count, index in enumerate(reversed(range(samples * len(self.asked)))):
            if count == self.stop_after:
                raise KeyboardInterrupt
            yield Completion(index, f"<answer>{BOX}{index % 4}{END_BOX}", (), 3, "stop")


def options_for(sampling, **fields):
    return sampling_options(RLConfig(verifiers=CONFIGS, sampling=sampling, **fields), Glm4vConfig.tiny())


@pytest.fixture
def problems(tmp_path):
    path = tmp_path / "data.jsonl"
    rows = [{"query": f"How many, {number}?", "response": str(number % 5), "key": f"k{number}"} for number in range(6)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return read_problems([str(path)], ["it"])


def test_an_interrupted_measurement_resumes_and_each_problem_has_one_line(problems, tmp_path):
    levels = Levels(tmp_path / "levels.jsonl", "abc", 4)
    options = options_for(SamplingConfig())
    with Judges(VERIFIERS) as judges:
        with pytest.raises(KeyboardInterrupt):
            measure(levels, problems, Scripted(stop_after=10), judges.score, options)
        assert levels.done() == {"k5", "k4"}
        with levels.path.open("a") as file:
            file.write('{"key": "k3", "mea')
        engine = Scripted()
        measure(levels, problems, engine, judges.score, options)
        again = Scripted()
        measure(levels, problems, again, judges.score, options)
    assert len(engine.asked) == 4 and not again.asked
    assert [request.options["seed"] for request in engine.asked] == [seed_of(0, f"k{number}") for number in range(4)]
    lines = {line["key"]: line for line in map(json.loads, levels.path.read_text().splitlines())}
    assert {key: line["mean"] for key, line in lines.items()} == {
        "k0": 0.25, "k1": 0.25, "k2": 0.25, "k3": 0.25, "k4": 0.0, "k5": 0.25,
    }  # fmt: skip
    assert lines["k0"] == {"key": "k0", "samples": 4, "right": 1, "mean": 0.25, "model": "abc"}


def test_lines_of_another_model_are_not_mixed_in(tmp_path):
    levels = Levels(tmp_path / "levels.jsonl", "abc", 4)
    levels.add("k0", [1.0, 0.0, 1.0, 1.0])
    with pytest.raises(
        DataError, match=r"levels\.jsonl:1: found 4 rollouts of model abc; expected 4 of def: pass --res"
    ):
        Levels(levels.path, "def", 4).done()


def test_budgets_force_an_answer_only_where_a_job_says_so():
    sampling = SamplingConfig(think_budget=6, answer_budget=4)
    assert options_for(sampling)["think_budget"] == 6
    assert options_for(sampling, truncated="mask")["max_new_tokens"] == 10


def test_what_counts_of_an_answer_is_what_counts_in_training(problems, tmp_path):
    """A thought that the prompt has opened is read; an answer at the limit has the reward that the job says."""

    class Cut(Scripted):
        def generate_many(self, prompts, **options):
            for one in super().generate_many(prompts, **options):
                thinking = dataclasses.replace(one.thinking, begins_open=True)
                yield dataclasses.replace(one, text=f"3</think>{one.text}", finish_reason="length", thinking=thinking)

    for truncated, mean in (("force", 0.25), ("zero", 0.0)):
        levels = Levels(tmp_path / f"{truncated}.jsonl", "abc", 4)
        with Judges(VERIFIERS) as judges:
            measure(levels, problems, Cut(), judges.score, options_for(SamplingConfig()), truncated=truncated)
        assert json.loads(levels.path.read_text().splitlines()[-1])["mean"] == mean


@pytest.mark.parametrize("text", ["no JSON\n", "[1]\n", "{}\n", '{"key": []}\n'])
def test_a_file_of_something_else_is_an_error_in_one_line(tmp_path, text):
    path = tmp_path / "levels.jsonl"
    path.write_text(text)
    with pytest.raises(DataError, match=r"levels\.jsonl:1: found no pass rate of a problem; expected one"):
        Levels(path, "abc", 4).done()


@pytest.mark.slow
def test_the_packaged_model_is_better_at_reading_than_at_what_it_was_not_taught(tmp_path, capsys):
    from glm4v_jax.tiny.digits import held_out

    rows = []
    for number, example in enumerate(held_out("reading")[:6]):
        image = tmp_path / f"{number}.png"
        example.messages[0]["content"][0]["image"].save(image)
        question = "<image>" + example.messages[0]["content"][1]["text"]
        rows += [
            {"messages": [{"role": "user", "content": question}], "images": [image.name], "answer": answer, "key": key}
            for key, answer in ((f"right{number}", example.answer), (f"wrong{number}", f"1{example.answer}"))
        ]
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    job = tmp_path / "job.toml"
    job.write_text(
        f'model = "{TINY_CHECKPOINT}"\nout = "out"\nsteps = 1\nmesh = "data=1"\n[data]\nfiles = ["data.jsonl"]\n'
        '[rl.sampling]\nslots = 8\nthink_budget = 64\nanswer_budget = 24\n[rl.verifiers.digits]\nkind = "counting"\n'
    )
    assert main(["levels", str(job), "--samples", "4"]) == 0
    lines = [json.loads(line) for line in pathlib.Path(tmp_path, "levels.jsonl").read_text().splitlines()]
    rates = {line["key"]: line["mean"] for line in lines}
    assert len(rates) == 12 and sum(rates[f"right{number}"] for number in range(6)) > 4
    assert not any(rates[f"wrong{number}"] for number in range(6))
    assert "pass rates of 12 problems" in capsys.readouterr().out
