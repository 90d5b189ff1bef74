"""Learning of preferences: losses and gradients against torch, packing, and a job that learns which answer is meant."""

import dataclasses
import json
import math
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import PIL.Image
import pytest
from helpers_checkpoints import RANDOM_CHECKPOINT
from reference import CONFIGS, Prompts, assert_close, assert_gradients_equal, export, to_torch

from glm4v_jax.batch import Batch
from glm4v_jax.checkpoints.load import load_model
from glm4v_jax.config.model import Glm4vConfig
from glm4v_jax.errors import ConfigError, DataError
from glm4v_jax.inputs.processor import Glm4vProcessor
from train import references
from train.config import load_config
from train.data.packing import TrainBatch, pack
from train.data.records import Record
from train.data.samples import IGNORED, encode
from train.log import EVALUATIONS, METRICS, read_log
from train.loop import train
from train.output import REFERENCES
from train.preference import LOSSES, Pairs, PreferenceConfig, pairs_of, preference_loss
from train.references import table_of
from train.step import loss_sums

pytestmark = pytest.mark.usefixtures("mesh")

CONFIG = Glm4vConfig.from_dict(CONFIGS["base"])
OPTIONS = dict(beta=0.3, margin=0.4, label_smoothing=0.1, sft=0.2)


def options_of(name):
    """What a loss has of the options."""
    without = {"simpo": set(), "dpo": {"margin"}, "dpo_norm": {"margin"}, "cpo": {"margin"}}
    return {key: value for key, value in OPTIONS.items() if key not in without.get(name, {"margin", "label_smoothing"})}


def their_loss(name, logprobs, reference, lengths):
    """The losses as TRL 0.24 computes them (DPOTrainer.dpo_loss, CPOTrainer.cpo_loss, ORPOTrainer.odds_ratio_loss)."""
    torch = pytest.importorskip("torch")
    sigmoid, beta = torch.nn.functional.logsigmoid, OPTIONS["beta"]
    means = logprobs / lengths
    x = {
        "dpo": (logprobs - reference), "hinge": (logprobs - reference), "cpo": logprobs,
        "dpo_norm": (logprobs - reference) / lengths, "ipo": (logprobs - reference) / lengths, "simpo": means,
    }.get(name)  # fmt: skip
    if name == "orpo":
        odds = (means[:, 0] - means[:, 1]) - (torch.log1p(-means[:, 0].exp()) - torch.log1p(-means[:, 1].exp()))
        loss = -means[:, 0] - beta * sigmoid(odds)
    else:
        logits = x[:, 0] - x[:, 1]
        if name == "ipo":
            loss = (logits - 1 / (2 * beta)) ** 2
        elif name == "hinge":
            loss = torch.relu(1 - beta * logits)
        else:
            logits = logits - (OPTIONS["margin"] / beta if name == "simpo" else 0)
            smoothing = OPTIONS["label_smoothing"]
            loss = -sigmoid(beta * logits) * (1 - smoothing) - sigmoid(-beta * logits) * smoothing
    return loss - OPTIONS["sft"] * means[:, 0]


@pytest.mark.parametrize("name", LOSSES)
def test_losses_and_their_gradients_equal(name):
    torch = pytest.importorskip("torch")
    random = np.random.RandomState(0)
    lengths = random.randint(2, 30, (40, 2)).astype(np.float32)
    logprobs, reference = (-lengths * random.uniform(0.1, 3, (40, 2)).astype(np.float32) for _ in range(2))
    reference *= LOSSES[name].has_reference  # 0 as in a batch without
    theirs = torch.tensor(logprobs, dtype=torch.float64, requires_grad=True)
    expected = their_loss(name, theirs, torch.tensor(reference), torch.tensor(lengths))
    expected.sum().backward()
    options = PreferenceConfig(loss=name, **options_of(name))

    def total(logprobs):
        loss, _ = preference_loss(Pairs(logprobs, jnp.asarray(reference), jnp.asarray(lengths)), options)
        return jnp.sum(loss), loss

    gradient, found = jax.grad(total, has_aux=True)(jnp.asarray(logprobs))
    assert_close(found, expected.detach().numpy(), tolerance=1e-5)
    assert_close(gradient, theirs.grad.numpy(), tolerance=1e-5)


def batch_of_pair(prompts, answers, reference):
    """Both rows of some prompts, one behind the other in a row of 64; of each the last tokens are its answer."""
    lengths = prompts.real.sum(axis=1).tolist()
    ids, segments, targets = (np.full((1, 64), fill, np.int32) for fill in (0, 0, IGNORED))
    positions, values = np.ones((3, 1, 64), np.int32), np.zeros((1, 64), np.float32)
    start = 0
    for row, (length, answer) in enumerate(zip(lengths, answers, strict=True)):
        here = np.s_[0, start : start + length]
        ids[here], segments[here] = prompts.input_ids[row, :length], row + 1
        positions[:, 0, start : start + length] = np.arange(length)
        said = np.s_[0, start + length - 1 - answer : start + length - 1]
        targets[said], values[said] = prompts.input_ids[row, length - answer : length], reference[row] / answer
        start += length
    return TrainBatch(Batch(ids, segments, positions, None, None), targets, (targets >= 0).astype(np.float32), values)


@pytest.mark.slow
def test_gradients_of_the_model_equal(checkpoints, theirs):
    torch = pytest.importorskip("torch")
    model, reference, answers, before = load_model(checkpoints("base"), CONFIG), theirs("base"), (5, 9), (-31.0, -52.0)
    prompts = Prompts(CONFIG, [[12], [30]], padding="right", seed=3)
    batch = batch_of_pair(prompts, answers, before)
    options = PreferenceConfig(beta=0.3)
    reference.zero_grad(set_to_none=True)
    reference.model.rope_deltas = None
    logits = reference(**to_torch(prompts.inputs)).logits.log_softmax(-1)
    summed = []
    for row, answer in enumerate(answers):
        end = int(prompts.real[row].sum())
        said = torch.tensor(prompts.input_ids[row, end - answer : end], dtype=torch.long)
        summed.append(logits[row, end - answer - 1 : end - 1].gather(1, said[:, None]).sum())
    margin = (summed[0] - before[0]) - (summed[1] - before[1])
    expected = -torch.nn.functional.logsigmoid(0.3 * margin)
    expected.backward()

    def loss(model):
        sums = loss_sums(model, batch, chunk=16, preference=options)
        return sums.loss, sums

    gradient, sums = jax.jit(jax.grad(loss, has_aux=True))(model)
    np.testing.assert_allclose(sums.loss, expected.item(), rtol=1e-5)
    np.testing.assert_allclose(sums.margin, 0.3 * margin.item(), rtol=1e-4)
    assert float(sums.weight) == 1
    assert_gradients_equal(export(gradient, CONFIG), reference)


def pair(image, chosen, rejected, asked="Which?"):
    def messages(said):
        items = [{"type": "image", "image": image}, {"type": "text", "text": asked}]
        return (
            {"role": "user", "content": items},
            {"role": "assistant", "content": [{"type": "text", "text": said}]},
        )

    both = (Record(messages(said), (False, True), "x:1") for said in (chosen, rejected))
    first, second = both
    return dataclasses.replace(first, rejected=second)


@pytest.mark.slow
def test_a_pair_has_its_image_once_and_both_answers_are_those_of_conversations_alone():
    processor, config = (
        Glm4vProcessor.from_pretrained(RANDOM_CHECKPOINT),
        Glm4vConfig.from_pretrained(RANDOM_CHECKPOINT),
    )
    model = load_model(RANDOM_CHECKPOINT, config, dtype="float32")
    random = np.random.default_rng(0)
    images = [PIL.Image.fromarray(random.integers(0, 256, (56, 84, 3), np.uint8)) for _ in range(3)]
    records = [pair(image, "a cat", "it is a dog" + "!" * i) for i, image in enumerate(images)]
    samples = [encode(record, processor, config) for record in records]
    shape = dict(rows=2, length=160, vision_shape=(1, 256), config=config)
    run = jax.jit(lambda model, batch: pairs_of(model, model(batch.batch), batch, chunk=64))
    packed = pack([dataclasses.replace(sample, reference=(-1.5, -2.5)) for sample in samples], **shape)
    assert int((np.asarray(packed.batch.vision.segment_ids) > 0).sum()) == sum(
        len(s.prompt.media[0].patches) for s in samples
    )
    found = run(model, packed)
    there = np.asarray(found.are_there)
    assert there.sum() == 3 and not there[1:, 1:].any()
    np.testing.assert_allclose(np.asarray(found.reference)[there], [[-1.5, -2.5]] * 3, rtol=1e-6)
    for record, logprobs, lengths in zip(
        records, np.asarray(found.logprobs)[there], np.asarray(found.lengths)[there], strict=True
    ):
        for side, one in enumerate((dataclasses.replace(record, rejected=None), record.rejected)):
            alone = encode(one, processor, config)
            assert lengths[side] == alone.num_targets
            expected = run(model, pack([alone], **shape))
            np.testing.assert_allclose(logprobs[side], float(expected.logprobs[0, 0, 0]), rtol=1e-5)


JOB = f"""
model = {json.dumps(str(RANDOM_CHECKPOINT))}
out = "out"
steps = 12
freeze = ["vision"]
dtype = "float32"
remat = "none"
mesh = "data=1"
preference = {{ beta = 0.2 }}
[data]
files = ["data.jsonl"]
[batch]
rows = 2
length = 128
vision_rows = 1
vision_length = 128
[optimizer]
learning_rate = 1e-3
schedule = "constant"
warmup = 2
[eval]
files = ["held.jsonl"]
every = 6
[checkpoint]
every = 6
"""


@pytest.mark.slow
def test_a_job_learns_which_answer_is_preferred(tmp_path):
    """Red or blue, of images it has not seen: and what it is compared with is computed once."""
    random = np.random.default_rng(1)
    for name, count in (("data", 24), ("held", 8)):
        rows = []
        for number in range(count):
            color = number % 2
            pixels = random.integers(0, 60, (56, 56, 3), np.uint8)
            pixels[..., 2 * color] += 180
            PIL.Image.fromarray(pixels).save(tmp_path / f"{name}{number}.png")
            answers = ("red", "blue") if color == 0 else ("blue", "red")
            asked, said = {"role": "user", "content": "<image>Which?"}, {"role": "assistant", "content": answers[0]}
            rows.append({"messages": [asked, said], "rejected_response": answers[1], "images": [f"{name}{number}.png"]})
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "job.toml").write_text(JOB)
    config, told = load_config(tmp_path / "job.toml"), []
    assert train(config, log=told.append) == (12, True)
    assert "compiling 1 of 3: log probabilities before the training" in told
    lines, (first, last) = read_log(tmp_path / "out" / METRICS), read_log(tmp_path / "out" / EVALUATIONS)
    assert lines[0]["loss"] == pytest.approx(math.log(2), rel=1e-4) and lines[0]["margin"] == pytest.approx(0, abs=1e-4)
    assert last["margin"] > first["margin"] > 0 and last["loss"] < 0.6 and last["accuracy"] >= 0.75, told
    table = np.load(tmp_path / "out" / REFERENCES)["logprobs"]
    assert table.shape == (24, 2) and np.isfinite(table).all() and (table < 0).all()
    changed = dataclasses.replace(config, steps=13)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("train.references.compute", lambda *_: pytest.fail("computed again"))
        patch.setattr("train.loop.compute", lambda *_: pytest.fail("computed again"))
        assert train(changed).step == 13
        # What the answers are as tokens depends on the chat template, too.
        other = shutil.copytree(RANDOM_CHECKPOINT, tmp_path / "other")
        with (other / "chat_template.jinja").open("a") as file:
            file.write("{# changed #}")
        for out in ("same", "again"):
            (tmp_path / out).mkdir()
            shutil.copy(tmp_path / "out" / REFERENCES, tmp_path / out)
        assert train(dataclasses.replace(config, steps=3, out=str(tmp_path / "same"))).step == 3
        with pytest.raises(pytest.fail.Exception, match="computed again"):
            train(dataclasses.replace(changed, model=str(other), out=str(tmp_path / "again")))


@pytest.mark.slow
def test_pairs_that_are_all_too_long_leave_nothing(tmp_path):
    PIL.Image.new("RGB", (56, 56)).save(tmp_path / "a.png")
    said = [{"role": "user", "content": "<image>Which?"}, {"role": "assistant", "content": "red"}]
    row = {"messages": said, "rejected_response": "blue", "images": ["a.png"]}
    (tmp_path / "data.jsonl").write_text(json.dumps(row))
    text = JOB.replace("length = 128\nvision_rows", "length = 16\nvision_rows").replace(
        '[eval]\nfiles = ["held.jsonl"]', ""
    )
    (tmp_path / "job.toml").write_text(text.replace("every = 6\n[checkpoint]", "[checkpoint]"))
    with pytest.raises(DataError, match=r"found no pair in 1 row; .*too long: found more tokens than batch\.length"):
        train(load_config(tmp_path / "job.toml"))
    assert not (tmp_path / "out").exists()


def test_a_table_of_another_model_or_a_damaged_one_is_computed_again(tmp_path):
    path, found = tmp_path / "references.npz", [(0, (-1.0, -2.0))]

    def table(digest, computed=lambda: found):
        return table_of(path, digest, 1, computed, lambda line: None).tolist()

    assert table("a") == table("a", lambda: pytest.fail("computed again")) == [[-1.0, -2.0]]
    found = [(0, (-3.0, -4.0))]
    assert table("b") == [[-3.0, -4.0]]
    for damaged in (b"PK", path.read_bytes()[:100], b""):
        path.write_bytes(damaged)
        assert table("b") == [[-3.0, -4.0]]


def test_a_table_is_the_same_in_all_processes(tmp_path, monkeypatch):
    """Where a job resumes: the first one has read it, and the others have not."""
    path, told = tmp_path / "references.npz", []
    arguments = path, "a", 2, lambda: [(1, (-1.0, -2.0))], lambda line: None
    first = table_of(*arguments)
    monkeypatch.setattr(references, "gathered", lambda value: told.append(json.loads(json.dumps(value))) or [True])
    monkeypatch.setattr(references, "shared", lambda table: told.append(table) or first)
    for is_first in (True, False):
        monkeypatch.setattr(references, "is_first", lambda is_first=is_first: is_first)
        assert table_of(*arguments) is first
    (is_there, own), (is_elsewhere, other) = told[:2], told[2:]
    assert is_there is True and is_elsewhere is False
    np.testing.assert_array_equal(own, first)
    assert (other.shape, other.dtype) == (own.shape, own.dtype) == ((2, 2), np.float32)


def test_samples_are_not_cut_and_options_are_checked(tmp_path):
    (tmp_path / "job.toml").write_text(
        JOB.replace("[data]", '[data]\ntoo_long = "cut"').replace("0.2 }", '0, loss = "dop" }')
    )
    with pytest.raises(ConfigError) as error:
        load_config(tmp_path / "job.toml")
    assert "preference.loss: found 'dop'" in str(error.value) and "preference.beta: found 0" in str(error.value)
    for loss, option in (("dpo", "margin"), ("ipo", "label_smoothing")):
        with pytest.raises(ConfigError, match=f"{option}: found 0.1; expected 0 with loss '{loss}'"):
            PreferenceConfig(**{"loss": loss, option: 0.1})
    (tmp_path / "job.toml").write_text(JOB.replace("[data]", '[data]\ntoo_long = "cut"'))
    with pytest.raises(ConfigError, match="too_long: found 'cut' beside preference; expected 'drop' or 'error'"):
        load_config(tmp_path / "job.toml")
