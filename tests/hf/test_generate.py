"""Generation against the reference: the same tokens, whatever else is in the batch; and no compilation when warm."""

import numpy as np
import pytest
from reference import CONFIGS, Prompts, their_inputs, to_torch

from glm4v_jax.config.model import Glm4vConfig
from glm4v_jax.errors import GenerationError, MessageError

pytestmark = pytest.mark.slow

CONFIG = Glm4vConfig.from_dict(CONFIGS["base"])
NEVER = dict(eos_token_id=-1, pad_token_id=0)

ROWS = {
    "text": [[13]],
    "texts": [[13], [5], [28]],
    "pictures": [[3, ("image", (4, 6)), 4], [2, ("image", (2, 10)), ("image", (4, 4)), 5]],
    "videos": [[3, ("video", (2, 4, 4)), 4], [3, ("video", (1, 2, 6)), 2]],
    "rows of text, pictures and videos": [
        [11], [2, ("image", (4, 6)), 3], [("video", (2, 4, 2)), 3], [2, ("image", (4, 2)), 1, ("video", (1, 4, 4)), 2],
    ],
}  # fmt: skip


def greedy(model, inputs, new, **options):
    """The reference's own greedy generation."""
    import torch

    model.model.rope_deltas = None
    with torch.no_grad():
        out = model.generate(**inputs, max_new_tokens=new, do_sample=False, pad_token_id=0, **options)
    return out.numpy()


def greedy_by_hand(model, prompts, new):
    """What the reference generates from pictures and videos together: token by token, every time from the start."""
    import torch

    row = prompts.input_ids[prompts.real].tolist()
    made = []
    for _ in range(new):
        prompts.input_ids = np.array([row + made])
        prompts.attention_mask = np.ones_like(prompts.input_ids)
        with torch.no_grad():
            made.append(int(model(**their_inputs(model, prompts)).logits[0, -1].argmax()))
    return made


PADDED = [(case, padding) for case, rows in ROWS.items() for padding in ["left", "right"][: len(rows)]]


@pytest.mark.parametrize(("case", "padding"), [(case, padding) for case, padding in PADDED if "and" not in case])
def test_greedy_tokens_equal_over_64(ours, theirs, case, padding):
    rows = ROWS[case]
    prompts = Prompts(CONFIG, rows, padding=padding, seed=len(case))
    found = ours("base").generate(**prompts.inputs, max_new_tokens=64, **NEVER)
    assert np.array_equal(found[:, : prompts.input_ids.shape[1]], prompts.input_ids)
    # 4.57.1 goes on from a right-padded row's padding: it is given the same prompts padded on the left.
    left = Prompts(CONFIG, rows, padding="left", seed=len(case))
    expected = greedy(theirs("base"), to_torch(left.inputs), 64, eos_token_id=None)
    assert np.array_equal(found[:, -64:], expected[:, -64:])
    assert found.dtype == np.int64 and found.shape == expected.shape


@pytest.fixture(scope="module")
def mixed(theirs):
    """Prompts of one row each, of all modalities, and what the reference generates from each."""
    prompts = [Prompts(CONFIG, [row], seed=20 + i) for i, row in enumerate(ROWS["rows of text, pictures and videos"])]
    expected = []
    for i, one in enumerate(prompts):
        if one.pixel_values is not None and one.pixel_values_videos is not None:
            again = Prompts(CONFIG, [ROWS["rows of text, pictures and videos"][i]], seed=20 + i)
            expected.append(greedy_by_hand(theirs("base"), again, 24))
        else:
            expected.append(greedy(theirs("base"), to_torch(one.inputs), 64, eos_token_id=None)[0, -64:].tolist())
    return prompts, expected


@pytest.mark.parametrize("padding", ["left", "right"])
def test_mixed_modalities_equal_each_row_alone(ours, mixed, padding):
    prompts, expected = mixed
    found = ours("base").generate(**join(prompts, padding), max_new_tokens=64, **NEVER)[:, -64:]
    assert sorted(map(len, expected)) == [24, 64, 64, 64]
    for row, other in zip(found.tolist(), expected, strict=True):
        assert row[: len(other)] == other


def join(prompts, padding):
    """The inputs of prompts of one row each as one batch."""
    length = max(one.input_ids.shape[1] for one in prompts)
    inputs = {}
    for name in ("input_ids", "attention_mask"):
        rows = [getattr(one, name)[0] for one in prompts]
        pads = [(length - len(row), 0) if padding == "left" else (0, length - len(row)) for row in rows]
        inputs[name] = np.stack([np.pad(row, pad) for row, pad in zip(rows, pads, strict=True)])
    for name in ("pixel_values", "image_grid_thw", "pixel_values_videos", "video_grid_thw"):
        if parts := [getattr(one, name) for one in prompts if getattr(one, name) is not None]:
            inputs[name] = np.concatenate(parts)
    return inputs


@pytest.mark.parametrize("name", [name for name in CONFIGS if name != "base"])
def test_greedy_tokens_equal_in_other_configurations(ours, theirs, name):
    prompts = Prompts(Glm4vConfig.from_dict(CONFIGS[name]), [[3, ("image", (4, 2)), 4], [9]], seed=4)
    found = ours(name).generate(**prompts.inputs, max_new_tokens=24, **NEVER)
    assert np.array_equal(found, greedy(theirs(name), to_torch(prompts.inputs), 24, eos_token_id=None))


def test_greedy_after_a_long_prompt(ours, theirs):
    prompts = Prompts(CONFIG, [[280, ("image", (4, 6)), 250]], seed=5)
    found = ours("base").generate(**prompts.inputs, max_new_tokens=20, **NEVER)
    assert np.array_equal(found, greedy(theirs("base"), to_torch(prompts.inputs), 20, eos_token_id=None))


def test_repetition_penalty_equals(ours, theirs):
    prompts = Prompts(CONFIG, [[13]], seed=6)
    found = ours("base").generate(**prompts.inputs, max_new_tokens=24, repetition_penalty=1.3, **NEVER)
    expected = greedy(theirs("base"), to_torch(prompts.inputs), 24, eos_token_id=None, repetition_penalty=1.3)
    assert np.array_equal(found, expected)


def test_rows_end_on_their_own(ours, theirs):
    """A row that meets an end token goes on with padding; the batch ends with its last row."""
    prompts = Prompts(CONFIG, ROWS["texts"], seed=7)
    inputs = to_torch(prompts.inputs)
    free = greedy(theirs("base"), inputs, 30, eos_token_id=None)[:, -30:]
    # Tokens that end the rows at different times: one of the first row's, one of the second's.
    eos = [int(free[0, 7]), int(free[1, 15])]
    expected = greedy(theirs("base"), inputs, 30, eos_token_id=eos)
    found = ours("base").generate(**prompts.inputs, max_new_tokens=30, eos_token_id=eos, pad_token_id=0)
    assert np.array_equal(found[:, : expected.shape[1]], expected)
    assert (expected[:, -1] == 0).any()  # or the test shows nothing
    assert found.shape == expected.shape


def test_all_rows_end_early(ours, theirs):
    prompts = Prompts(CONFIG, [[13]], seed=8)
    inputs = to_torch(prompts.inputs)
    eos = int(greedy(theirs("base"), inputs, 12, eos_token_id=None)[0, -1])
    expected = greedy(theirs("base"), inputs, 40, eos_token_id=eos)
    assert expected.shape[1] <= 13 + 12
    found = ours("base").generate(**prompts.inputs, max_new_tokens=40, eos_token_id=eos, pad_token_id=0)
    assert np.array_equal(found, expected)


def test_one_new_token(ours, theirs):
    prompts = Prompts(CONFIG, ROWS["texts"], seed=9)
    found = ours("base").generate(**prompts.inputs, max_new_tokens=1, **NEVER)
    assert np.array_equal(found, greedy(theirs("base"), to_torch(prompts.inputs), 1, eos_token_id=None))


def test_several_sequences_of_a_prompt(ours):
    prompts = Prompts(CONFIG, ROWS["pictures"], seed=10)
    model = ours("base")
    several = dict(max_new_tokens=12, num_return_sequences=3, do_sample=True, top_k=0, **NEVER)
    one = model.generate(**prompts.inputs, max_new_tokens=12, **NEVER)
    # So cold that the likeliest token is drawn: the greedy answer, three times for each prompt, in the prompts' order.
    assert np.array_equal(model.generate(**prompts.inputs, temperature=1e-6, **several), np.repeat(one, 3, axis=0))
    drawn = model.generate(**prompts.inputs, temperature=3.0, **several)
    assert len({tuple(row) for row in drawn[:, -12:].tolist()}) == 6


def test_draws_depend_on_the_seed_and_the_row_alone(ours):
    model = ours("base")
    alone = [Prompts(CONFIG, [row], seed=30 + i) for i, row in enumerate(ROWS["pictures"])]
    options = dict(max_new_tokens=20, do_sample=True, temperature=2.0, top_p=0.95, **NEVER)
    joint = join(alone, "left")
    first = model.generate(**joint, seed=5, **options)[:, -20:]
    assert np.array_equal(first, model.generate(**joint, seed=5, **options)[:, -20:])
    assert not np.array_equal(first, model.generate(**joint, seed=6, **options)[:, -20:])
    # Row 0 draws the same whether or not there is a row 1, and whichever side it is padded on.
    assert np.array_equal(first[0], model.generate(**alone[0].inputs, seed=5, **options)[0, -20:])
    assert np.array_equal(first, model.generate(**join(alone, "right"), seed=5, **options)[:, -20:])


def test_draws_follow_the_models_probabilities(ours):
    """The first token of 512 draws from one prompt, against its softmax: chi-square over the likeliest tokens."""
    model = ours("base")
    prompts = Prompts(CONFIG, [[13]], seed=11)
    logits = np.asarray(model(**prompts.inputs).logits)[0, -1].astype(np.float64) / 0.7
    chances = np.exp(logits - logits.max())
    chances /= chances.sum()
    drawn = model.generate(
        **prompts.inputs, max_new_tokens=1, num_return_sequences=512, do_sample=True, top_k=0, temperature=0.7, **NEVER
    )[:, -1]
    counts = np.bincount(drawn, minlength=len(chances))
    often = np.flatnonzero(512 * chances >= 5)
    assert len(often) >= 5
    observed = np.append(counts[often], 512 - counts[often].sum())
    expected = 512 * np.append(chances[often], 1 - chances[often].sum())
    chi2 = ((observed - expected) ** 2 / expected).sum()
    assert chi2 < len(often) + 5 * np.sqrt(2 * len(often))


def test_a_warm_bucket_compiles_nothing(ours, lowerings):
    """New sizes, numbers and kinds of media, other texts and other options: the same programs."""
    model = ours("base")

    def ask(rows, number, **options):
        prompts = Prompts(CONFIG, rows, seed=number)
        model.generate(**prompts.inputs, max_new_tokens=20, **NEVER, **options)

    ask([[8, ("image", (6, 8)), 1, ("image", (2, 4)), 1, ("video", (2, 2, 4)), 4]], 0)
    with lowerings() as lowered:
        ask([[3, ("image", (4, 10)), 27]], 1)
        ask([[9, ("image", (2, 4)), ("image", (4, 4)), 20]], 2)
        ask([[9, ("video", (2, 4, 4)), 1, ("image", (2, 2)), 6]], 3)
        ask([[20, ("image", (2, 18)), 1]], 4, do_sample=True, temperature=0.5, top_k=7, top_p=0.9, min_p=0.1, seed=9)
    assert lowered == []
    # The listener does hear: a prompt of a bucket that no other test uses has to be compiled.
    with lowerings() as lowered:
        ask([[3000]], 5)
    assert lowered


def test_many_tokens_may_end_a_row(ours):
    prompts = Prompts(CONFIG, [[13]], seed=14)
    free = ours("base").generate(**prompts.inputs, max_new_tokens=12, **NEVER)[0, 13:].tolist()
    last = next(i for i, token in enumerate(free) if i >= 2 and token not in free[:i])
    ends = [*[token for token in range(300) if token not in free][:12], free[last]]
    found = ours("base").generate(**prompts.inputs, max_new_tokens=12, eos_token_id=ends, pad_token_id=0)
    assert found[0, 13:].tolist() == free[: last + 1]


@pytest.mark.parametrize(
    "option", [dict(top_kk=3), dict(temperature=-1.0), dict(num_beams=4), dict(max_new_tokens=5000)]
)
def test_impossible_options_are_refused(ours, option):
    with pytest.raises(GenerationError):
        ours("base").generate(input_ids=np.arange(1, 9)[None], **{"max_new_tokens": 4, **option})


def test_missing_media_are_refused(ours):
    prompts = Prompts(CONFIG, [[3, ("image", (4, 6)), 4]], seed=12)
    with pytest.raises(MessageError, match="too few images"):
        ours("base").generate(input_ids=prompts.input_ids, max_new_tokens=4)


def test_stacked_layers_generate_the_same(ours, checkpoints):
    from glm4v_jax import Glm4vForConditionalGeneration

    prompts = Prompts(CONFIG, ROWS["pictures"], seed=10)
    stacked = Glm4vForConditionalGeneration.from_pretrained(checkpoints("base"), stacked=True)
    assert stacked.module.language_model.layers.is_stacked
    assert not ours("base").module.language_model.layers.is_stacked
    found = stacked.generate(**prompts.inputs, max_new_tokens=24, **NEVER)
    assert np.array_equal(found, ours("base").generate(**prompts.inputs, max_new_tokens=24, **NEVER))
