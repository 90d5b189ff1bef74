"""`make tiny` without its training: what it learns from fits its batches, and how it puts the result in its place."""

import numpy as np
import pytest

from glm4v_jax.config.model import Glm4vConfig
from glm4v_jax.inputs.processor import Glm4vProcessor
from glm4v_jax.tiny import TINY_CHECKPOINT
from glm4v_jax.tiny.digits import held_out
from tools.digit_curriculum import CYCLE, DigitRecords
from tools.digit_scores import Row, Scores
from tools.score_tiny import flattened, missed, shuffled_frames
from tools.train_tiny import RECORDS_PER_STEP, Run, as_json, as_markdown, job, package
from train.data.packing import Packer
from train.data.samples import encode

ROWS = [Row("reading", Scores(360, 0.96, 1.0), 0.95, 0.98), Row("motion", Scores(360, 0.97, 1.0), 0.95, 0.25)]
RUN = Run(2000, 0, "ab12", 2_700_000, {"training": 400.0, "measuring": 30.0})


def test_batches_are_full_and_records_are_enough(tmp_path):
    """The end of the curriculum, where most pictures have two digits, and no record is left out."""
    pytest.importorskip("sklearn")
    processor, config = Glm4vProcessor.from_pretrained(TINY_CHECKPOINT), Glm4vConfig.from_pretrained(TINY_CHECKPOINT)
    batch = job(tmp_path, tmp_path).batch
    packer = Packer(rows=batch.rows, length=batch.length, vision_shape=(batch.vision_rows, batch.vision_length))
    samples = [encode(record, processor, config) for record in DigitRecords(20 * CYCLE)[-10 * CYCLE :]]
    packed = [done for sample in samples if (done := packer.push(sample)) is not None]
    assert np.mean([len(done) for done in packed]) < RECORDS_PER_STEP
    tokens = np.mean([sum(map(len, done)) for done in packed])
    assert tokens > 0.85 * batch.rows * batch.length
    learned = processor.tokenizer.decode(samples[0].targets[samples[0].targets >= 0].tolist())
    assert learned.startswith("<think>") and learned.endswith("<|end_of_box|></answer><|user|>")


def test_coordinates_and_box_markers_are_single_tokens():
    tokenizer = Glm4vProcessor.from_pretrained(TINY_CHECKPOINT).tokenizer
    for text in (*map(str, range(0, 1000, 10)), "<|begin_of_box|>", "<|end_of_box|>"):
        assert len(tokenizer(text, add_special_tokens=False)["input_ids"]) == 1


def test_flattened_positions_are_those_of_text():
    from glm4v_jax.generate.prompt import prompt_of

    pytest.importorskip("sklearn")
    processor, config = Glm4vProcessor.from_pretrained(TINY_CHECKPOINT), Glm4vConfig.from_pretrained(TINY_CHECKPOINT)
    prompt = prompt_of(held_out("motion")[0].prompt, processor, config)
    flat = flattened(prompt)
    np.testing.assert_array_equal(flat.position_ids, np.tile(np.arange(len(prompt)), (3, 1)))
    assert flat.delta == 0 != prompt.delta
    # What is written next is at the next place.
    np.testing.assert_array_equal(flat.extended([1]).position_ids[:, -1], [len(prompt)] * 3)


def test_shuffled_frames_are_the_same_in_another_order():
    pytest.importorskip("sklearn")
    for number, example in enumerate(held_out("motion")[:20]):
        shuffled = shuffled_frames(example, number)
        ours, theirs = ([frame.tobytes() for frame in e.media] for e in (example, shuffled))
        assert ours != theirs and sorted(ours) == sorted(theirs)
        assert shuffled.answer == example.answer and shuffled.messages[1] == example.messages[1]


def test_missed_aims_are_named():
    assert missed(ROWS) == []
    low = ROWS[0]._replace(scores=Scores(360, 0.9, 1.0))
    unformed = ROWS[1]._replace(scores=Scores(360, 0.97, 0.99))
    assert [line.split(":")[0] for line in missed([low, unformed, ROWS[0]._replace(aim=None)])] == ["reading", "motion"]
    assert "found accuracy 90.0% and format 100.0%; expected at least 95% and 100%" in missed([low])[0]


def test_the_report_has_the_figures():
    page, figures = as_markdown(RUN, ROWS), as_json(RUN, ROWS)
    assert "| reading | 96.0% | 95.0% | 98.0% |" in page and "2.7 MB" in page and "2000 steps in 400 s" in page
    assert '"weights": "ab12"' in figures and '"accuracy": 0.96' in figures


def test_packaging_replaces_the_checkpoint(tmp_path):
    source, target = tmp_path / "new", tmp_path / "package" / "tiny"
    for directory, name in ((source, "new"), (target, "old")):
        directory.mkdir(parents=True)
        (directory / name).write_text(name)
    package(source, target)
    assert [path.name for path in target.parent.iterdir()] == ["tiny"]
    assert [path.name for path in target.iterdir()] == ["new"] and (source / "new").exists()
    package(source, tmp_path / "package" / "first")
    assert (tmp_path / "package" / "first" / "new").exists()
