"""Generation against the reference: the same tokens, whatever else is in the batch; and no compilation when warm."""

import jax.numpy as jnp
import numpy as np
import pytest
from helpers_checkpoints import RANDOM_CHECKPOINT
from reference import CONFIGS, Prompts, their_inputs, to_torch

from glm4v_jax.config.model import Glm4vConfig
from glm4v_jax.errors import GenerationError, MessageError
from glm4v_jax.inputs.make_batch import MIN_LENGTH
from glm4v_jax.inputs.vision_rows import bucket

pytestmark = pytest.mark.slow

CONFIG = Glm4vConfig.from_dict(CONFIGS["base"])
NEVER = dict(eos_token_id=-1, pad_token_id=0)

ROWS = {
    "text": [[13]],
    "texts": [[13], [5], [28]],
    "pictures": [[3, ("image", (4, 6)), 4], [2, ("image", (2, 10)), ("image", (4, 4)), 5]],
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


@pytest.mark.parametrize(("case", "padding"), [("text", "left"), ("pictures", "left"), ("pictures", "right")])
def test_greedy_tokens_equal_over_64(ours, theirs, case, padding):
    """A batch of texts, pictures and videos: `test_mixed_modalities_equal_each_row_alone`."""
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
    free = greedy(theirs("base"), inputs, 40, eos_token_id=None)[:, -40:]
    # Tokens that end the rows at different times: one of the first row's, one of the second's.
    eos = [int(free[0, 7]), int(free[1, 15])]
    expected = greedy(theirs("base"), inputs, 40, eos_token_id=eos)
    found = ours("base").generate(**prompts.inputs, max_new_tokens=40, eos_token_id=eos, pad_token_id=0)
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
    prompts = Prompts(CONFIG, ROWS["pictures"], seed=9)
    found = ours("base").generate(**prompts.inputs, max_new_tokens=1, **NEVER)
    assert np.array_equal(found, greedy(theirs("base"), to_torch(prompts.inputs), 1, eos_token_id=None))


def test_several_sequences_of_a_prompt(ours):
    prompts = Prompts(CONFIG, ROWS["pictures"], seed=10)
    model = ours("base")
    several = dict(max_new_tokens=64, num_return_sequences=2, do_sample=True, top_k=0, **NEVER)
    one = model.generate(**prompts.inputs, max_new_tokens=64, **NEVER)
    # So cold that the likeliest token is drawn: the greedy answer, twice for each prompt, in the prompts' order.
    assert np.array_equal(model.generate(**prompts.inputs, temperature=1e-6, **several), np.repeat(one, 2, axis=0))
    drawn = model.generate(**prompts.inputs, temperature=3.0, **several)
    assert len({tuple(row) for row in drawn[:, -64:].tolist()}) == 4


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
    options = dict(max_new_tokens=1, num_return_sequences=16, do_sample=True, top_k=0, temperature=0.7, **NEVER)
    # In small batches: a program for 512 rows takes a minute to compile.
    drawn = np.concatenate([model.generate(**prompts.inputs, seed=seed, **options)[:, -1] for seed in range(32)])
    counts = np.bincount(drawn, minlength=len(chances))
    often = np.flatnonzero(512 * chances >= 5)
    assert len(often) >= 5
    observed = np.append(counts[often], 512 - counts[often].sum())
    expected = 512 * np.append(chances[often], 1 - chances[often].sum())
    chi2 = ((observed - expected) ** 2 / expected).sum()
    assert chi2 < len(often) + 5 * np.sqrt(2 * len(often))


WHOLE = dict(return_dict_in_generate=True, output_scores=True, output_logits=True)


@pytest.fixture(scope="module")
def plain(theirs):
    """Two prompts of one length, for the reference counts padding among a row's tokens; and the greedy tokens."""
    prompts = Prompts(CONFIG, [[13], [13]], seed=40)
    return prompts.inputs, greedy(theirs("base"), to_torch(prompts.inputs), 24, eos_token_id=None)[:, -24:].tolist()


def only_even(tokens, scores):
    """Drops what has the parity of the newest token."""
    return jnp.where(jnp.arange(scores.shape[1]) % 2 == tokens[:, -1:] % 2, -jnp.inf, scores)


def only_even_in_torch(tokens, scores):
    import torch

    return torch.where(torch.arange(scores.shape[1]) % 2 == tokens[:, -1:] % 2, -torch.inf, scores)


SCENARIOS = {
    "nothing": lambda row: {},
    "min_new_tokens": lambda row: dict(min_new_tokens=9, eos_token_id=[row[1], row[4], row[11]]),
    "no_repeat_ngram_size 2": lambda row: dict(no_repeat_ngram_size=2),
    "bad_words_ids": lambda row: dict(bad_words_ids=[[row[0]], row[4:6], [row[8]]], eos_token_id=[row[8]]),
    "suppress_tokens": lambda row: dict(suppress_tokens=sorted(set(row[:6]))),
    "sequence_bias": lambda row: dict(sequence_bias=[[row[2:4], -4.5], [[row[1]], 0.5], [[299], 1.0]]),
    "all": lambda row: dict(
        sequence_bias={(row[3],): 3.0}, repetition_penalty=1.2, no_repeat_ngram_size=2, bad_words_ids=[row[1:3]],
        min_new_tokens=12, suppress_tokens=[row[6]], eos_token_id=[row[7], row[9]],
    ),
    "sampled, with one candidate": lambda row: dict(do_sample=True, temperature=0.7, top_k=1, no_repeat_ngram_size=2),
}  # fmt: skip


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_tokens_scores_and_logits_equal(ours, theirs, plain, scenario):
    import torch

    inputs, rows = plain
    options = {"do_sample": False, "eos_token_id": None, **SCENARIOS[scenario](rows[0])}
    theirs("base").model.rope_deltas = None
    with torch.no_grad():
        expected = theirs("base").generate(**to_torch(inputs), max_new_tokens=24, pad_token_id=0, **WHOLE, **options)
    found = ours("base").generate(**inputs, max_new_tokens=24, **WHOLE, **{**NEVER, **given(options)})
    assert_outputs_equal(found, expected)
    if scenario != "nothing":
        assert not np.array_equal(found.sequences[:, 13:], rows)


def given(options):
    return {name: value for name, value in options.items() if value is not None}


def assert_outputs_equal(found, expected):
    """Equal tokens; scores and logits up to each row's end, where the reference goes on from padding."""
    sequences = expected.sequences.numpy()
    assert np.array_equal(found.sequences, sequences) and found.sequences.dtype == np.int64
    assert found.keys() == ["sequences", "scores", "logits"]
    assert len(found.scores) == len(found.logits) == len(expected.scores) == sequences.shape[1] - 13
    for ours, theirs in ((found.scores, expected.scores), (found.logits, expected.logits)):
        theirs = np.stack([step.numpy() for step in theirs])
        scale = np.abs(theirs[np.isfinite(theirs)]).max()
        for step, (row, other) in enumerate(zip(ours, theirs, strict=True)):
            assert row.dtype == np.float32
            live = (row != 0).any(axis=1)
            assert live[sequences[:, 13 + step] != 0].all()
            np.testing.assert_allclose(row[live], other[live], rtol=0, atol=1e-5 * scale)


def test_a_function_may_choose_the_scores(ours, theirs, plain):
    import torch
    from transformers import LogitsProcessorList

    inputs, rows = plain
    theirs("base").model.rope_deltas = None
    with torch.no_grad():
        expected = theirs("base").generate(
            **to_torch(inputs), max_new_tokens=24, do_sample=False, eos_token_id=None, pad_token_id=0, **WHOLE,
            logits_processor=LogitsProcessorList([only_even_in_torch]), no_repeat_ngram_size=3,
        )  # fmt: skip
    found = ours("base").generate(
        **inputs, max_new_tokens=24, **WHOLE, logits_processor=only_even, no_repeat_ngram_size=3, **NEVER
    )
    assert_outputs_equal(found, expected)
    assert not np.array_equal(found.sequences[:, 13:], rows)


def test_tokens_do_not_depend_on_what_else_is_returned(ours, plain):
    inputs, _ = plain
    options = dict(max_new_tokens=24, no_repeat_ngram_size=2, **NEVER)
    tokens = ours("base").generate(**inputs, **options)
    found = ours("base").generate(**inputs, **options, return_dict_in_generate=True)
    assert np.array_equal(found.sequences, tokens) and found.keys() == ["sequences"]
    assert np.array_equal(ours("base").generate(**inputs, **options, output_scores=True), tokens)


def test_padding_is_no_part_of_an_ngram(ours):
    """Rows of a batch, padded on either side, give what each gives alone; the reference counts padding."""
    alone = [Prompts(CONFIG, [row], seed=30 + i) for i, row in enumerate(ROWS["pictures"])]
    options = dict(max_new_tokens=20, no_repeat_ngram_size=2, sequence_bias={(0, 0, 3): 50.0, (7,): 0.5}, **NEVER)
    expected = [ours("base").generate(**one.inputs, **options)[0, -20:].tolist() for one in alone]
    for padding in ("left", "right"):
        assert ours("base").generate(**join(alone, padding), **options)[:, -20:].tolist() == expected


class Listener:
    """A streamer that keeps what it is given."""

    def __init__(self):
        self.heard, self.ended = [], 0

    def put(self, tokens):
        self.heard.append(np.asarray(tokens).tolist())

    def end(self):
        self.ended += 1


@pytest.mark.parametrize("rows", [["text"], ["texts"]])
def test_a_streamer_hears_what_the_references_does(ours, theirs, rows):
    prompts = Prompts(CONFIG, ROWS[rows[0]], seed=7)
    free = ours("base").generate(**prompts.inputs, max_new_tokens=12, **NEVER)[:, -12:]
    options = dict(eos_token_id=[int(free[0, 5]), int(free[-1, 9])])
    expected, found = Listener(), Listener()
    greedy(theirs("base"), to_torch(prompts.inputs), 12, streamer=expected, **options)
    ours("base").generate(**prompts.inputs, max_new_tokens=12, streamer=found, pad_token_id=0, **options)
    assert found.heard == expected.heard and found.ended == expected.ended == 1


@pytest.fixture(scope="module")
def tokenizers():
    """This package's tokenizer and the reference's, of a checkpoint whose first 256 tokens are bytes."""
    from helpers_transformers import import_transformers

    from glm4v_jax.inputs.text.tokenizer import Glm4vTokenizer

    transformers = import_transformers()
    return Glm4vTokenizer.from_pretrained(RANDOM_CHECKPOINT), transformers.AutoTokenizer.from_pretrained(
        RANDOM_CHECKPOINT
    )


def test_stop_strings_end_rows_where_the_references_do(ours, theirs, tokenizers):
    """Beginning in the prompt, within tokens, over several; the first that is complete counts."""
    prompts, tokenizer = Prompts(CONFIG, [[13]], seed=5), tokenizers[0]
    inputs = prompts.inputs | {"input_ids": np.append(prompts.input_ids[:, :-1], tokenizer.encode("a")[-1:])[None]}
    free = ours("base").generate(**inputs, max_new_tokens=24, **NEVER)[0]
    text = tokenizer.decode(free[12:])
    assert text.startswith("aay on") and "le n r" in text
    for strings, end in [("aa", 14), ("y o", 15), (["n r", "le n"], None), (["never that", "le n", "e"], None)]:
        expected = greedy(
            theirs("base"), to_torch(inputs), 24, eos_token_id=None, stop_strings=strings, tokenizer=tokenizers[1]
        )
        found = ours("base").generate(**inputs, max_new_tokens=24, stop_strings=strings, tokenizer=tokenizer, **NEVER)
        assert np.array_equal(found, expected) and 14 <= found.shape[1] < 37
        assert end in (None, found.shape[1])


def test_rows_that_meet_a_stop_string_are_padded(ours, plain, tokenizers):
    inputs, rows = plain
    texts = [tokenizers[0].decode([token]) for token in rows[0]]
    string = next(text for text in texts[3:20] if "\ufffd" not in text)
    found = ours("base").generate(
        **inputs, max_new_tokens=24, stop_strings=string, tokenizer=tokenizers[0], **NEVER, **WHOLE
    )
    ends = [next((i for i in range(24) if string in tokenizers[0].decode(row[: i + 1])), 23) for row in rows]
    new = found.sequences[:, 13:]
    assert ends[0] < 23 and new.shape[1] == max(ends) + 1 == len(found.scores)
    for row, end in enumerate(ends):
        assert new[row, : end + 1].tolist() == rows[row][: end + 1]
        assert not new[row, end + 1 :].any()
        assert not any(step[row].any() for step in found.scores[end + 1 :])


def test_a_warm_bucket_compiles_nothing(ours, lowerings):
    """New sizes, numbers and kinds of media, other texts and other options: the same programs."""
    model = ours("base")

    def ask(rows, number, new=20, **options):
        prompts = Prompts(CONFIG, rows, seed=number)
        model.generate(**prompts.inputs, max_new_tokens=new, **NEVER, **options)
        return bucket(prompts.input_ids.shape[1], MIN_LENGTH)

    warm = ask([[8, ("image", (6, 8)), 1, ("image", (2, 4)), 1, ("video", (2, 2, 4)), 4]], 0)
    sampled = dict(do_sample=True, temperature=0.5, top_k=7, top_p=0.9, min_p=0.1, seed=9)
    with lowerings() as lowered:
        lengths = {
            ask([[3, ("image", (4, 10)), 27]], 1),
            ask([[9, ("image", (2, 4)), ("image", (4, 4)), 20]], 2),
            ask([[9, ("video", (2, 4, 4)), 1, ("image", (2, 2)), 6]], 3),
            ask([[21, ("image", (2, 18)), 1]], 4, **sampled),
        }
    assert lowered == [] and lengths == {warm}
    # The listener does hear: a prompt of a bucket that no other test uses has to be compiled.
    with lowerings() as lowered:
        ask([[3000]], 5, new=1)
    assert lowered


def test_many_tokens_may_end_a_row(ours):
    prompts = Prompts(CONFIG, [[13]], seed=14)
    free = ours("base").generate(**prompts.inputs, max_new_tokens=12, **NEVER)[0, 13:].tolist()
    last = next(i for i, token in enumerate(free) if i >= 2 and token not in free[:i])
    ends = [*[token for token in range(300) if token not in free][:12], free[last]]
    found = ours("base").generate(**prompts.inputs, max_new_tokens=12, eos_token_id=ends, pad_token_id=0)
    assert found[0, 13:].tolist() == free[: last + 1]


@pytest.mark.parametrize(
    ("option", "message"),
    [
        (dict(top_kk=3), "top_kk"),
        (dict(temperature=-1.0), "temperature"),
        (dict(num_beam_groups=4), "num_beam_groups"),
        (dict(num_beams=4, streamer=object()), "streamer: found one beside num_beams=4"),
        (dict(max_new_tokens=5000), "max_new_tokens"),
        (dict(stop_strings="a"), r"stop_strings: found \('a',\) without a tokenizer; expected tokenizer=processor"),
        (dict(suppress_tokens=[320]), "suppress_tokens or sequence_bias: found 320; expected tokens below 320"),
        (dict(think_budget=4), r"think_budget: found 4; expected None, or glm4v_jax\.Engine"),
    ],
)
def test_impossible_options_are_refused(ours, option, message):
    with pytest.raises(GenerationError, match=message):
        ours("base").generate(input_ids=np.arange(1, 9)[None], **{"max_new_tokens": 4, **option})


def test_missing_media_are_refused(ours):
    prompts = Prompts(CONFIG, [[3, ("image", (4, 6)), 4]], seed=12)
    with pytest.raises(MessageError, match="too few images"):
        ours("base").generate(input_ids=prompts.input_ids, max_new_tokens=4)


def test_stacked_layers_have_the_same_beams(ours, theirs, checkpoints):
    """As the reference, and so as layers one by one. Stacked without beams is the engine of `tests/generate`."""
    from glm4v_jax import Glm4vForConditionalGeneration

    prompts = Prompts(CONFIG, ROWS["pictures"], seed=10)
    stacked = Glm4vForConditionalGeneration.from_pretrained(checkpoints("base"), stacked=True)
    assert stacked.module.language_model.layers.is_stacked
    assert not ours("base").module.language_model.layers.is_stacked
    beams = dict(num_beams=3, num_return_sequences=3)
    expected = greedy(theirs("base"), to_torch(prompts.inputs), 12, eos_token_id=None, **beams)
    assert np.array_equal(stacked.generate(**prompts.inputs, max_new_tokens=12, **NEVER, **beams), expected)
