"""Learning by reward: what sharing a prompt and its images within a group gives, and where the time of a step goes.

    python -m bench.rl [--rounds N] [--quick]

About 35 million random float32 parameters on a CPU, two ways in turns, ratios within a round:

- rollouts: answers to one prompt from one prefill, and from a prefill each; prompts 4, 8, and 16 times as long as
  answers. Beside the ratio stands its ceiling, what it would be if sharing cost nothing, neither copies of keys and
  values nor waiting: the time with a prefill each, about n P + D, by P + D, where P is the time of one prefill a group
  and D that of decoding;
- rollouts about an image: encoded once a group, and once an answer;
- training on them: an image once a group in the micro-batch, and once an answer. The ViT's work is what it encodes.

Then a job as `glm4v train` runs it, of the packaged model, which locates handwritten digits: the share of each phase of
its steps, and the programs that are compiled after the first, whose number of groups and lengths of answers vary.

Prints tables; writes `bench/results/rl.json`; exits with status 1 if an aim is missed. `--quick` runs all of it at tiny
sizes on the packaged model, and writes nothing.
"""

import json
import pathlib
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import numpy as np
import optax

from bench import models, report, turns
from bench.report import Check
from bench.turns import TimedTask
from glm4v_jax.checkpoints.load import load_model
from glm4v_jax.config.generation import GenerationConfig
from glm4v_jax.config.model import Glm4vConfig
from glm4v_jax.devices.mesh import use_mesh
from glm4v_jax.generate.engine import Engine
from glm4v_jax.inputs.processor import Glm4vProcessor
from glm4v_jax.inputs.prompt import Prompt
from glm4v_jax.model.runtime import Runtime
from glm4v_jax.tiny import TINY_CHECKPOINT, digits
from train.config import BatchConfig, CheckpointConfig, DataConfig, TrainConfig
from train.data.packing import TrainBatch
from train.data.placement import put, stacked
from train.log import METRICS, read_log
from train.optimizers import OptimizerConfig
from train.rl.config import RLConfig, SamplingConfig, VerifierConfig
from train.rl.groups import Group, Rollout
from train.rl.handover import Handover
from train.rl.loop import learn
from train.rl.loss import Objective
from train.rl.packing import micro_batches
from train.rl.rollouts import media_tokens
from train.rl.step import PolicyStep
from train.state import Layout, init_state, split

MIN_ROLLOUT_RATIO = 1.5
MAX_HANDOVER = 0.02
PHASES = ("rollout", "scoring", "packing", "learning", "handover")


class Sizes(NamedTuple):
    """How much is measured: n answers to each of some prompts; a square image; steps of the job, and its problems.

    `rollouts` has tokens of prompts and of their answers.
    """

    n: int
    groups: int
    rollouts: tuple[tuple[int, int], ...]
    image: int
    image_answer: int
    steps: int
    problems: int
    prompts: int


FULL = Sizes(
    n=8, groups=2, rollouts=((512, 128), (512, 64), (512, 32)), image=336, image_answer=32, steps=21, problems=64,
    prompts=8,
)  # fmt: skip
QUICK = Sizes(
    n=2, groups=1, rollouts=((24, 6), (24, 3)), image=84, image_answer=4, steps=3, problems=24, prompts=2
)  # fmt: skip


class Model:
    """A model that samples and learns, and what of it is timed: its methods return seconds.

    Two ways of a method differ in what they share, and are otherwise the same work.
    """

    def __init__(self, directory: pathlib.Path, sizes: Sizes, mesh: jax.sharding.Mesh):
        self.sizes, self._mesh = sizes, mesh
        self._config = Glm4vConfig.from_pretrained(directory)
        model = load_model(directory, self._config, dtype="float32", stacked=True)
        layout = Layout.of(model)
        params, self._frozen = split(model, lambda path: True)
        optimizer = optax.adam(1e-6)
        self._state = init_state(params, optimizer)
        banned = media_tokens(self._config)
        self._step = PolicyStep(layout, optimizer, Objective(banned=banned), dtype=np.float32, remat="none")
        handover = Handover(layout, params, self._frozen, np.float32, mesh)
        runtime = Runtime.of(handover(params), mesh, GenerationConfig())
        processor = Glm4vProcessor.from_pretrained(directory)
        self.engine = Engine(runtime, processor, num_slots=sizes.n * sizes.groups)
        self._options: dict[str, Any] = dict(
            do_sample=True, top_k=0, suppress_tokens=banned, logprobs=0, logprobs_of="sampling", eos_token_id=-1
        )
        self._batches: dict[str, list[TrainBatch]] = {}

    def rollout(self, way: str, prompt: int, answer: int) -> float:
        """Sample answers to prompts of text, from a prefill each or for all of a group; both lengths in tokens."""
        sizes, rng = self.sizes, np.random.default_rng(0)
        size = min(self._config.text_config.vocab_size, *media_tokens(self._config))
        count = sizes.groups if way == "one prefill" else sizes.groups * sizes.n
        prompts = [Prompt.of_text(rng.integers(0, size, prompt).tolist()) for _ in range(count)]
        return self._sample(prompts, sizes.groups * sizes.n // count, answer)[0]

    def rollout_about_images(self, way: str) -> float:
        """Sample answers to prompts with an image, a prefill each; the image is one of the group's, or of its own."""
        return self._sample(self._asked(way), 1, self.sizes.image_answer)[0]

    def learn(self, way: str) -> float:
        """Take a step on answers about images, which share that of their group, or have each its own."""
        since = time.perf_counter()
        batches = self._packed(way)
        count = float(self.sizes.n * self.sizes.groups)
        self._state, metrics = self._step(self._state, self._frozen, batches, count, 0)
        jax.block_until_ready(metrics)
        return time.perf_counter() - since

    def patches(self, way: str) -> int:
        """How many patches the ViT encodes in that step."""
        visions = [batch.batch.vision for batch in self._packed(way)]
        return sum(np.count_nonzero(np.asarray(vision.segment_ids)).item() for vision in visions if vision is not None)

    def encoded(self, way: str) -> int:
        """How many images the engine encodes for those answers."""
        before = self.engine.pool.encoded
        self.rollout_about_images(way)
        return self.engine.pool.encoded - before

    def _asked(self, way: str) -> list[Prompt]:
        sizes, prompts = self.sizes, list[Prompt]()
        for group in range(sizes.groups):
            pixels = np.random.default_rng(group).integers(0, 256, (sizes.image, sizes.image, 3), np.uint8)
            for answer in range(sizes.n):
                own = pixels.copy()
                own[0, 0] = answer if way == "once an answer" else 0
                # Prompts that begin alike would share more than the image.
                texts = [{"type": "text", "text": text} for text in (f"{answer} ", "What is this?")]
                content = [texts[0], {"type": "image", "image": own}, texts[1]]
                prompts.append(self.engine.prompt([{"role": "user", "content": content}]))
        return prompts

    def _sample(self, prompts: Sequence[Prompt], samples: int, length: int) -> tuple[float, list[Any]]:
        self.engine.release()  # what was encoded, and keys and values
        since = time.perf_counter()
        found = list(
            self.engine.generate_many(prompts, samples=samples, max_new_tokens=length, seed=0, **self._options)
        )
        seconds = time.perf_counter() - since
        assert sum(len(one.tokens) for one in found) == samples * len(prompts) * length
        return seconds, sorted(found, key=lambda one: one.index)

    def _packed(self, way: str) -> list[TrainBatch]:
        """The micro-batches of a step: as few as hold the answers, with as many vision rows as their images need."""
        if way not in self._batches:
            sizes, prompts = self.sizes, self._asked(way)
            _, found = self._sample(prompts, 1, sizes.image_answer)
            groups = [
                Group(str(number), prompt, (Rollout.of(one),), np.zeros(1))
                for number, (prompt, one) in enumerate(zip(prompts, found, strict=True))
            ]
            patches = len(prompts[0].media[0].patches)
            images = sizes.groups * (sizes.n if way == "once an answer" else 1)
            length = len(prompts[0]) + sizes.image_answer
            batch = BatchConfig(rows=len(prompts), length=length, vision_rows=images, vision_length=patches)
            packed = micro_batches(groups, batch, self._config)
            assert len(packed) == 1
            self._batches[way] = [put(stacked([one]), self._mesh) for one in packed]
        return self._batches[way]


class Pair(NamedTuple):
    """Two ways of a method of `Model`, the first of which shares; amounts of a unit, and the ratio that is aimed at."""

    what: str
    task: str
    ways: tuple[str, str]
    unit: str
    amount: int
    aim: float | None = None
    lengths: Mapping[str, int] = MappingProxyType({})


SIDES = ("ours", "theirs")
_PREFILLS = ("one prefill", "each its own")
_IMAGES = ("once a group", "once an answer")


def compared(model: Model, rounds: int) -> list[dict[str, Any]]:
    """All pairs of ways, in turns."""
    sizes = model.sizes
    answers = sizes.n * sizes.groups

    def rollouts(prompt: int, answer: int) -> Pair:
        what = f"rollouts, prompts {prompt // answer} x answers ({prompt} / {answer}): a prefill a group, or an answer"
        lengths = {"prompt": prompt, "answer": answer}
        return Pair(what, "rollout", _PREFILLS, "tokens/s", answers * answer, MIN_ROLLOUT_RATIO, lengths)

    shown = [
        *(rollouts(*lengths) for lengths in sizes.rollouts),
        Pair("rollouts: an image encoded once a group, or an answer", "rollout_about_images", _IMAGES, "answers/s",
             answers),
        Pair("training: an image encoded once a group, or an answer", "learn", _IMAGES, "samples/s", answers),
    ]  # fmt: skip
    prefills = {prompt: rollouts(prompt, 1) for prompt, _ in sizes.rollouts}
    pairs = [*shown, *prefills.values()]
    works = [
        {side: TimedTask(pair.task, {"way": way, **pair.lengths}) for side, way in zip(SIDES, pair.ways, strict=True)}
        for pair in pairs
    ]

    def work(task: str, **arguments: Any) -> float:
        return getattr(model, task)(**arguments)

    results = turns.measure({"ours": work, "theirs": work}, works, rounds)
    of_prefills = dict(zip(prefills, results[len(shown) :], strict=True))
    lines = list[dict[str, Any]]()
    for pair, each in zip(shown, results, strict=False):
        ours, theirs = ([one[side] for one in each] for side in SIDES)
        lines.append({"what": pair.what, "unit": pair.unit, **turns.compare(ours, theirs, pair.amount, pair.aim)})
        if pair.lengths:
            both = zip(each, of_prefills[pair.lengths["prompt"]], strict=True)
            ceilings = [ceiling(one, prefill, sizes.n) for one, prefill in both]
            lines[-1] |= {**pair.lengths, "ceiling": turns.spread(ceilings)}
    return lines


def ceiling(rollouts: Mapping[str, float], prefills: Mapping[str, float], n: int) -> float:
    """Return the ratio of rollouts with a prefill each to those that share one, if sharing cost nothing.

    Args:
      rollouts: seconds of both sides.
      prefills: the same, of one token an answer: nearly without decoding.
      n: answers that share.

    >>> ceiling({"ours": 5.0, "theirs": 11.5}, {"ours": 1.5, "theirs": 8.0}, n=8)
    2.5555555555555554
    """
    decoding = rollouts["ours"] - prefills["ours"]
    return rollouts["theirs"] / (prefills["theirs"] / n + decoding)


def vision_work(model: Model) -> dict[str, Any]:
    """How much less is encoded where a group shares its image."""
    counts = {
        name: [count(way) for way in ("once a group", "once an answer")]
        for name, count in (("images_of_rollouts", model.encoded), ("patches_of_training", model.patches))
    }
    ratios = {name: each / shared for name, (shared, each) in counts.items()}
    return {**counts, "ratios": ratios, "aim": model.sizes.n, "passed": min(ratios.values()) >= model.sizes.n}


def _job(directory: pathlib.Path, sizes: Sizes) -> TrainConfig:
    """The job that is measured: the packaged model learns to find digits."""
    return TrainConfig(
        model=str(TINY_CHECKPOINT),
        out=str(directory / "out"),
        data=DataConfig(files=(str(directory / "problems.jsonl"),)),
        steps=sizes.steps,
        batch=BatchConfig(rows=8, length=128, vision_rows=4, vision_length=256),
        optimizer=OptimizerConfig(learning_rate=1e-4),
        checkpoint=CheckpointConfig(every=1000),
        rl=RLConfig(
            verifiers={"digits": VerifierConfig(kind="grounding", threshold=0.7)},
            prompts=sizes.prompts,
            samples=sizes.n,
            sampling=SamplingConfig(slots=32, think_budget=16, answer_budget=48, temperature=1.2),
        ),
        freeze=(),
        dtype="float32",
        remat="none",
        mesh="data=1",
    )


def run_job(directory: pathlib.Path, sizes: Sizes, log: Callable[[str], None] | None = None) -> dict[str, Any]:
    """Run a job of the packaged model, and say where the time of its steps after the first goes."""
    rows = []
    for number, example in enumerate(digits.examples("grounding2", "train", sizes.problems)):
        example.media.save(directory / f"{number}.png")
        content = [{"type": "image", "image": f"{number}.png"}, example.messages[0]["content"][1]]
        row = {"messages": [{"role": "user", "content": content}], "boxes": [list(example.boxes[0])]}
        rows.append(row | {"width": 1000, "height": 1000, "domain": "digits"})
    (directory / "problems.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    learn(_job(directory, sizes), log=log)
    lines = [line for line in read_log(directory / "out" / METRICS)[1:] if line["learned"]]
    seconds = {name: sum(line[f"seconds_{name}"] for line in lines) for name in PHASES}
    whole = sum(seconds.values())
    answers, learned = (sum(line[name] for line in lines) * sizes.n for name in ("groups", "learned"))
    compiled = sum(line["compiles"] for line in lines)
    handover = statistics.median(
        line["seconds_handover"] / sum(line[f"seconds_{name}"] for name in PHASES) for line in lines
    )
    return {
        "steps": len(lines),
        "seconds_per_step": whole / len(lines),
        "shares": {name: value / whole for name, value in seconds.items()},
        "answers_per_second": answers / seconds["rollout"],
        "samples_per_second": learned / seconds["learning"],
        "tokens": [min(line["length"] for line in lines), max(line["length"] for line in lines)],
        "groups": [min(line["learned"] for line in lines), max(line["learned"] for line in lines)],
        "largest_ratio_deviation": max(line["ratio_first_dev"] for line in lines),
        "compilations_after_the_first_step": compiled,
        "handover": handover,
        "aim": MAX_HANDOVER,
        "passed": compiled == 0 and handover <= MAX_HANDOVER,
    }


def run(sizes: Sizes, rounds: int, directory: pathlib.Path) -> dict[str, Any]:
    """Measure everything in an empty directory; of the rounds one more than `rounds` is for warming up."""
    load, checkpoint, content = turns.load_average(), TINY_CHECKPOINT, models.PACKAGED
    if sizes is not QUICK:
        content = models.TRAINING
        checkpoint = models.write_checkpoint(directory / "model", content, processor=True)
    with use_mesh() as mesh:
        model = Model(checkpoint, sizes, mesh)
        lines, vision = compared(model, rounds), vision_work(model)
        del model
    job = run_job(directory, sizes)
    return {
        "machine": report.machine_facts("jax", "numpy"),
        "load_before": load,
        "rounds": rounds,
        "parameters": models.num_parameters(content),
        "sizes": sizes._asdict() | {"rollouts": [list(lengths) for lengths in sizes.rollouts]},
        "lines": lines,
        "vision": vision,
        "job": job,
        "passed": vision["passed"] and job["passed"] and all(line["passed"] for line in lines),
    }


def tables(figures: dict[str, Any]) -> list[report.Table]:
    """The comparisons, and the job."""
    sizes, job, vision = figures["sizes"], figures["job"], figures["vision"]
    title = (
        f"{figures['parameters'] / 1e6:.0f}M parameters, {sizes['groups']} groups of {sizes['n']}, images of "
        f"{sizes['image']} x {sizes['image']}, {figures['rounds']} rounds"
    )
    speeds = [
        (f"{line['what']}, {line['unit']}", *(f"{line[side]['median']:,.1f}" for side in ("ours", "theirs")),
         f"{line['ceiling']['median']:.2f}" if "ceiling" in line else "", *report.judged(line))
        for line in figures["lines"]
    ]  # fmt: skip
    verdict = report.verdict(vision["passed"])
    encoded = [
        (name.replace("_", " "), *map("{:,}".format, vision[name]), f"{ratio:.1f}", f"{vision['aim']}", verdict)
        for name, ratio in vision["ratios"].items()
    ]
    compiled, is_short = job["compilations_after_the_first_step"], job["handover"] <= job["aim"]
    ranges = ("{:.3g} to {:.3g}".format(*job[name]) for name in ("groups", "tokens"))
    phases = [
        Check("steps; seconds a step", f"{job['steps']}; {job['seconds_per_step']:.2f}"),
        Check("groups; tokens an answer", "; ".join(ranges)),
        Check("answers a second of rollout", f"{job['answers_per_second']:.0f}"),
        Check("samples a second of learning", f"{job['samples_per_second']:.0f}"),
        *(Check(name, f"{share:.1%}") for name, share in job["shares"].items()),
        Check("handover, the median of the steps", f"{job['handover']:.1%}", f"at most {job['aim']:.0%}", is_short),
        Check("programs compiled after the first step", compiled, 0, not compiled),
    ]
    return [
        report.Table(title, ("", "shared", "each its own", "ceiling", "ratio", "aim", ""), speeds),
        report.Table("encoded by the ViT", ("", "shared", "each its own", "ratio", "aim", ""), encoded),
        report.check_table("a job, and the share of each phase of its steps", phases),
    ]


def main() -> int:
    """Measure, print, write; 1 if an aim is missed."""
    parser = report.parser("bench.rl", __doc__)
    parser.add_argument("--rounds", type=int, default=3, help="measurements of each side, in turns")
    parser.add_argument("--quick", action="store_true", help="tiny sizes, one round; writes nothing")
    arguments = parser.parse_args()
    sizes, rounds = (QUICK, 1) if arguments.quick else (FULL, arguments.rounds)
    with tempfile.TemporaryDirectory(prefix="glm4v_jax_rl_") as name:
        figures = run(sizes, rounds, pathlib.Path(name))
    if arguments.quick:
        report.console().print(*tables(figures))
        return 0
    return report.finish("rl", figures, *tables(figures))


if __name__ == "__main__":
    sys.exit(main())
