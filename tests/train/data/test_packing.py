"""Packing: nothing lost, nothing mixed, and to the model the same as one sample at a time."""

import json

import jax
import numpy as np
import PIL.Image
import pytest
from helpers_checkpoints import RANDOM_CHECKPOINT
from hypothesis import given, settings
from hypothesis import strategies as st

from glm4v_jax import make_batch
from glm4v_jax.config.model import Glm4vConfig
from glm4v_jax.errors import DataError
from glm4v_jax.inputs.processor import Glm4vProcessor
from glm4v_jax.inputs.prompt import prompts_of
from train.data.packing import Packer, pack, padding_of, place, vision_fits
from train.data.records import Record
from train.data.samples import IGNORED, Sample, encode

CONFIG = Glm4vConfig.from_dict(json.loads((RANDOM_CHECKPOINT / "config.json").read_text()))
IMAGE, BEGIN, END = CONFIG.image_token_id, CONFIG.image_start_token_id, CONFIG.image_end_token_id
SHAPE = (3, 128)

TOLERANCE = 1e-5


def made(texts, grids=(), seed=0):
    """A sample of random text and pictures: `texts[i]` tokens, then a picture of `grids[i]`, ...; the last are learned.

    Every patch is a number of its own.
    """
    rng = np.random.default_rng(seed)
    ids = []
    for i, n in enumerate(texts):
        ids += rng.integers(0, 700, n).tolist()
        if i < len(grids):
            ids += [BEGIN] + [IMAGE] * (grids[i][0] * grids[i][1] // 4) + [END]
    ids = np.array(ids, np.int32)
    targets = np.full(len(ids), IGNORED, np.int32)
    learned = max(texts[-1] // 2, 1)
    targets[-learned:] = rng.integers(0, 700, learned)
    grid_thw = np.array([(1, *grid) for grid in grids], np.int64).reshape(-1, 3)
    patches = rng.standard_normal((grid_thw.prod(axis=1).sum(), CONFIG.vision_config.patch_dim)).astype(np.float32)
    (prompt,) = prompts_of({"input_ids": ids[None], "pixel_values": patches, "image_grid_thw": grid_thw}, CONFIG)
    return Sample(prompt, targets, f"made:{seed}")


def seen_by(sample):
    """float32 [vision tokens, 4 * P]: the patches of every vision token, in the order of the tokens."""
    prompt = sample.prompt
    media = [medium.patches.reshape(-1, 4 * medium.patches.shape[-1]) for medium in prompt.media]
    here = np.flatnonzero(prompt.medium_of >= 0)
    return np.array([media[prompt.medium_of[i]][prompt.offset_of[i]] for i in here])


SAMPLES = [made([5, 4], [(4, 6)], 1), made([9], seed=2), made([3, 2, 6], [(2, 4), (6, 6)], 3), made([20], seed=4)]


def packed(samples, rows=2, length=48, vision_shape=SHAPE, **options):
    return pack(samples, rows=rows, length=length, vision_shape=vision_shape, config=CONFIG, **options)


def places_of(samples, **options):
    return place([len(sample) for sample in samples], **{"rows": 2, "length": 48, **options})


def check(batch, samples, places):
    """Every array holds the samples at their places, and padding elsewhere."""
    assert len({(p.row, p.segment) for p in places}) == len(samples)
    free = np.ones(batch.targets.shape, bool)
    vision = batch.batch.vision
    for sample, p in zip(samples, places, strict=True):
        here = np.s_[p.row, p.start : p.start + len(sample)]
        assert free[here].all()
        free[here] = False
        np.testing.assert_array_equal(batch.batch.input_ids[here], sample.input_ids)
        np.testing.assert_array_equal(batch.targets[here], sample.targets)
        np.testing.assert_array_equal(batch.batch.position_ids[:, here[0], here[1]], sample.position_ids)
        assert (batch.batch.segment_ids[here] == p.segment).all()
        if vision is not None:
            flat = vision.patches.reshape(-1, 4 * vision.patches.shape[-1])
            index, is_vision = batch.batch.vision_index[here], sample.prompt.medium_of >= 0
            assert ((index >= 0) == is_vision).all()
            assert not is_vision.any() or np.array_equal(flat[index[is_vision]], seen_by(sample))
    assert not batch.batch.segment_ids[free].any() and not batch.weights[free].any()
    assert (batch.targets[free] == IGNORED).all()
    assert ((batch.weights > 0) == (batch.targets != IGNORED)).all()
    if vision is not None:
        assert vision.segment_ids.max() == sum(len(sample.frames) for sample in samples)
        assert (batch.batch.vision_index[free] == -1).all()


def test_samples_are_copied_to_their_places():
    batch = packed(SAMPLES)
    places = places_of(SAMPLES)
    assert [(p.row, p.segment) for p in places] == [(0, 1), (0, 2), (1, 1), (0, 3)]
    check(batch, SAMPLES, places)
    assert batch.batch.input_ids.shape == (2, 48) and batch.batch.vision.patches.shape[:2] == SHAPE
    dtypes = {x.dtype.name for x in jax.tree.leaves(batch)}
    assert dtypes == {"int32", "float32"} and batch.weights.dtype == np.float32


def test_without_packing_a_row_has_one_sample():
    batch = packed(SAMPLES, rows=5, per_row=1)
    check(batch, SAMPLES, places_of(SAMPLES, rows=5, per_row=1))
    assert (batch.batch.segment_ids.max(axis=1) == [1, 1, 1, 1, 0]).all()


def test_batches_of_one_shape_have_one_structure():
    """Without pictures, and without samples, the arrays are the same ones: nothing is compiled anew."""
    trees = [jax.tree.map(lambda x: (x.shape, x.dtype), packed(some)) for some in (SAMPLES, SAMPLES[1::2], [])]
    assert trees[0] == trees[1] == trees[2]
    assert packed(SAMPLES[1::2], vision_shape=None).batch.vision is None


@pytest.mark.parametrize("average", ["token", "sample"])
def test_weights_are_averages_over_tokens_or_samples(average):
    batch = packed(SAMPLES, average=average)
    for sample, p in zip(SAMPLES, places_of(SAMPLES), strict=True):
        weights = batch.weights[p.row, p.start : p.start + len(sample)]
        expected = 1 if average == "token" else 1 / sample.num_targets
        np.testing.assert_allclose(weights, (sample.targets != IGNORED) * expected, rtol=1e-7)
    total = sum(sample.num_targets for sample in SAMPLES) if average == "token" else len(SAMPLES)
    assert batch.weights.sum() == pytest.approx(total, rel=1e-6)


@pytest.fixture(scope="module")
def scores(mesh):
    """Batch -> logits [B, T, V] and the loss of `train.loss`, by the random checkpoint in float32."""
    from glm4v_jax.hf.model import Glm4vForConditionalGeneration
    from train.loss import cross_entropy

    model = Glm4vForConditionalGeneration.from_pretrained(RANDOM_CHECKPOINT, stacked=True)
    assert model.dtype == np.float32

    @jax.jit
    def run(module, batch):
        hidden = module(batch.batch)
        return module.logits(hidden), cross_entropy(module, hidden, batch.targets, batch.weights)

    return lambda batch: jax.tree.map(np.asarray, run(model.module, batch))


@pytest.fixture(scope="module")
def real_samples():
    """Samples of the whole way, from records: text, a picture, several turns, a video."""
    rng = np.random.default_rng(5)
    picture = {"type": "image", "image": PIL.Image.fromarray(rng.integers(0, 256, (84, 140, 3), np.uint8))}
    video = {"type": "video", "video": rng.integers(0, 256, (4, 56, 84, 3), np.uint8)}
    processor = Glm4vProcessor.from_pretrained(RANDOM_CHECKPOINT)
    conversations = (
        [["Hi"], ["<think>a greeting</think><answer>Hello</answer>"]],
        [[picture, "What?"], ["A cat."], ["And this?"], ["<think>hm</think><answer>5</answer>"]],
        [[video, "Where?", picture], ["<think>it moves</think><answer>left</answer>"]],
        [["1+1"], ["2"]],
    )

    def message(number, content):
        items = [{"type": "text", "text": item} if isinstance(item, str) else item for item in content]
        return {"role": ("user", "assistant")[number % 2], "content": items}

    def record(contents, i):
        losses = tuple(bool(number % 2) for number in range(len(contents)))
        return Record(tuple(message(n, content) for n, content in enumerate(contents)), losses, f"x:{i}")

    return [encode(record(contents, i), processor, CONFIG) for i, contents in enumerate(conversations)]


@pytest.mark.slow
def test_packed_equals_unpacked_to_the_model(scores, real_samples):
    length = 160
    tokens = [len(sample) for sample in real_samples]
    options = {"length": length, "vision_shape": (2, 256)}
    both = {
        "packed": (dict(rows=2, **options), place(tokens, 2, length)),
        "alone": (dict(rows=4, per_row=1, **options), place(tokens, 4, length, 1)),
    }
    assert max(p.segment for p in both["packed"][1]) > 1
    found = {}
    for name, (shape, places) in both.items():
        for average in ("token", "sample"):
            logits, sums = scores(packed(real_samples, average=average, **shape))
            assert np.isfinite(logits).all()
            found[name, average] = sums
        found[name] = [logits[p.row, p.start : p.start + n] for p, n in zip(places, tokens, strict=True)]
    for sample, a, b in zip(real_samples, found["packed"], found["alone"], strict=True):
        assert np.abs(a - b).max() <= TOLERANCE * np.abs(b).max(), sample.source
    for average in ("token", "sample"):
        for a, b in zip(*(jax.tree.leaves(found[name, average]) for name in ("packed", "alone")), strict=True):
            np.testing.assert_allclose(a, b, rtol=TOLERANCE)
    # And both are what the model says to the sample by itself, prepared in the way of inference.
    for sample, b in zip(real_samples, found["alone"], strict=True):
        media = {}
        for medium in sample.prompt.media:
            values, grids = (
                ("pixel_values_videos", "video_grid_thw") if medium.grid[0] > 1 else ("pixel_values", "image_grid_thw")
            )
            media |= {values: medium.patches, grids: medium.grid[None]}
        batch, _ = make_batch(sample.input_ids[None].astype(np.int64), CONFIG, **media)
        alone, _ = scores(packed(SAMPLES[:1], rows=1, length=batch.input_ids.shape[1])._replace(batch=batch))
        assert np.abs(alone[0, : len(sample)] - b).max() <= TOLERANCE * np.abs(b).max(), sample.source


def test_samples_that_see_each_other_change_the_logits(scores, real_samples):
    """What the test before would find if samples saw one another, or pictures did."""
    batch = packed(real_samples, rows=1, length=320, vision_shape=(2, 256))
    logits, _ = scores(batch)
    joined = batch._replace(batch=batch.batch._replace(segment_ids=np.minimum(batch.batch.segment_ids, 1)))
    vision = batch.batch.vision
    fused = vision._replace(segment_ids=np.minimum(vision.segment_ids, 1))
    fused = batch._replace(batch=batch.batch._replace(vision=fused))
    for wrong in (joined, fused):
        assert np.abs(scores(wrong)[0] - logits).max() > 100 * TOLERANCE * np.abs(logits).max()


def test_an_empty_batch_has_finite_logits_and_no_loss(scores):
    logits, sums = scores(packed([], rows=2, length=160, vision_shape=(2, 256)))
    assert np.isfinite(logits).all() and sums.loss == 0 and sums.weight == 0


def test_padding_is_a_fraction_of_tokens_and_patches():
    share = padding_of(packed(SAMPLES))
    tokens, patches = sum(map(len, SAMPLES)), sum(int(sample.frames.prod(axis=1).sum()) for sample in SAMPLES)
    assert share.tokens == pytest.approx(1 - tokens / 96) and share.patches == pytest.approx(1 - patches / 384)
    assert padding_of(packed(SAMPLES[1::2], vision_shape=None)).patches is None


def test_samples_that_do_not_fit_are_refused():
    with pytest.raises(DataError, match=r"samples from made:1 on: found .* tokens; expected ones that fit 1 x 40"):
        packed(SAMPLES, rows=1, length=40)
    with pytest.raises(DataError, match=r"samples from made:1 on: found .* of 68 patches; expected .* \(1, 64\)"):
        packed(SAMPLES, vision_shape=(1, 64))
    with pytest.raises(DataError, match="vision rows of None"):
        packed(SAMPLES, vision_shape=None)


side = st.sampled_from([2, 4, 6])
sizes = st.tuples(st.integers(1, 24), st.lists(st.tuples(side, side), max_size=2))
streams = st.lists(sizes, max_size=30)
packers = st.fixed_dictionaries(
    {
        "rows": st.integers(1, 3),
        "length": st.sampled_from([48, 64]),
        "vision_shape": st.sampled_from([(2, 72), (3, 36)]),
        "per_row": st.sampled_from([None, 1, 2]),
        "open_batches": st.integers(1, 4),
    }
)


def stream_of(sizes):
    return [made([text, *[1] * len(grids)], grids, seed) for seed, (text, grids) in enumerate(sizes)]


@settings(max_examples=60, deadline=None)
@given(sizes=streams, options=packers)
def test_nothing_is_lost_and_limits_are_kept(sizes, options):
    stream = stream_of(sizes)
    batches = list(Packer(**options).batches(stream))
    assert sorted(id(sample) for batch in batches for sample in batch) == sorted(map(id, stream))
    shape = {name: value for name, value in options.items() if name != "open_batches"}
    for samples in batches:
        assert samples
        lengths = [len(sample) for sample in samples]
        places = place(lengths, options["rows"], options["length"], options["per_row"])
        check(pack(samples, config=CONFIG, **shape), samples, places)
    again = list(Packer(**options).batches(stream))
    assert [[s.source for s in batch] for batch in batches] == [[s.source for s in batch] for batch in again]


@settings(max_examples=60, deadline=None)
@given(sizes=streams, options=packers, data=st.data())
def test_resuming_anywhere_gives_the_same_rest(sizes, options, data):
    stream = stream_of(sizes)
    at = data.draw(st.integers(0, len(stream)))
    packer = Packer(**options)
    for sample in stream[:at]:
        packer.push(sample)
    state = json.loads(json.dumps(packer.get_state()))
    resumed = Packer(**options)
    resumed.set_state(state, stream.__getitem__)
    assert resumed.get_state() == state
    rest = [list(one.batches(stream[at:])) for one in (packer, resumed)]
    assert [list(map(id, batch)) for batch in rest[0]] == [list(map(id, batch)) for batch in rest[1]]


def test_a_sample_goes_to_the_first_batch_with_room_and_the_fullest_is_done_first():
    packer = Packer(rows=1, length=30, open_batches=2)
    done = [packer.push(made([n], seed=n)) for n in (12, 20, 5, 9, 25)]
    # 5 and 9 have room behind 12, and 25 nowhere: of 26 and 20 tokens the 26 go.
    assert done[:4] == [None] * 4
    assert [sample.source for sample in done[4]] == ["made:12", "made:5", "made:9"]
    assert packer.get_state() == {"pushed": 5, "open": [[1], [4]]}
    assert [sample.source for sample in packer.push(made([28], seed=28))] == ["made:25"]
    assert [[sample.source for sample in batch] for batch in packer.finish()] == [["made:20"], ["made:28"]]
    assert packer.get_state() == {"pushed": 6, "open": []}


def test_a_sample_that_fits_no_batch_is_refused():
    packer = Packer(rows=2, length=30, vision_shape=(2, 24), open_batches=2)
    packer.push(made([5]))
    before = packer.get_state()
    for sample, message in (
        (made([31], seed=8), "made:8: found 31 tokens; expected at most 30, a row"),
        (made([1, 1], [(6, 6)], 9), r"made:9: found 1 image or frame of up to 36 patches, 36 in all; exp"),
        (made([1, 1, 1, 1], [(4, 4)] * 3, 7), r"made:7: found 3 .* 48 in all; expected ones that fit .* \(2, 24\)"),
    ):
        with pytest.raises(DataError, match=message):
            packer.push(sample)
        assert packer.get_state() == before


def test_keys_of_the_caller_are_saved():
    packer = Packer(rows=1, length=30)
    packer.push(made([20]), key=["a.jsonl", 3])
    assert packer.get_state() == {"pushed": 1, "open": [[["a.jsonl", 3]]]}
    other = Packer(rows=1, length=10)
    with pytest.raises(DataError, match="which no longer fit a batch"):
        other.set_state(packer.get_state(), lambda key: made([20]))


def test_padding_of_mixed_lengths_is_below_a_tenth():
    """Lengths as in real data, many short and a few long: at most a tenth of the tokens' places stay empty."""
    rng = np.random.default_rng(0)
    lengths = np.clip(rng.lognormal(4.5, 0.9, 400).astype(int), 8, 1024)
    stream = [made([int(n)], seed=i) for i, n in enumerate(lengths)]
    batches = list(Packer(rows=4, length=1024, open_batches=2).batches(stream))
    shares = [1 - sum(map(len, batch)) / 4096 for batch in batches[:-2]]
    assert len(shares) > 5 and np.mean(shares) < 0.1
    unpacked = list(Packer(rows=4, length=1024, open_batches=2, per_row=1).batches(stream))
    assert np.mean([1 - sum(map(len, batch)) / 4096 for batch in unpacked]) > 0.8


@settings(max_examples=30, deadline=None)
@given(st.lists(st.tuples(side, side), max_size=8), st.tuples(st.integers(1, 3), st.sampled_from([16, 36, 72])))
def test_samples_pack_exactly_if_vision_fits_says_so(grids, shape):
    sample = made([1] * (len(grids) + 1), grids)
    options = {"rows": 1, "length": len(sample), "vision_shape": shape, "config": CONFIG}
    if vision_fits(sample.frames, shape):
        pack([sample], **options)
    else:
        with pytest.raises(DataError):
            pack([sample], **options)
