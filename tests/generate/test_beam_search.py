"""Beam search against the reference's: the same sequences and scores, whatever ends them."""

import numpy as np
import pytest
from reference import CONFIGS, TOLERANCE, Prompts, to_torch

from glm4v_jax.config.model import Glm4vConfig

CONFIG = Glm4vConfig.from_dict(CONFIGS["base"])
ROWS = [[11], [2, ("image", (4, 6)), 3], [6, ("image", (2, 10)), ("image", (4, 4)), 5]]
pytestmark = pytest.mark.slow
BEAMS = dict(
    num_beams=3,
    max_new_tokens=24,
    do_sample=False,
    pad_token_id=0,
    return_dict_in_generate=True,
    output_scores=True,
    output_logits=True,
)


@pytest.fixture(scope="module")
def prompts():
    return Prompts(CONFIG, ROWS, seed=1)


def their_beams(model, inputs, **options):
    import torch

    model.model.rope_deltas = None
    with torch.no_grad():
        return model.generate(**to_torch(inputs), **BEAMS | options)


@pytest.fixture(scope="module")
def ends(theirs, prompts):
    """Tokens that beams of these prompts have, at several places."""
    free = their_beams(theirs("base"), prompts.inputs, eos_token_id=None, num_return_sequences=3)
    new = free.sequences.numpy()[:, -24:]
    return [int(new[0, 5]), int(new[4, 9]), int(new[8, 16])]


@pytest.mark.parametrize(
    "options",
    [
        {},
        dict(num_return_sequences=3),
        dict(num_return_sequences=2, early_stopping=True),
        dict(num_return_sequences=3, early_stopping="never"),
        dict(num_return_sequences=3, early_stopping="never", length_penalty=-1.0),
        dict(num_return_sequences=3, length_penalty=0.0),
        dict(num_return_sequences=2, length_penalty=2.0),
        dict(num_return_sequences=3, repetition_penalty=1.3),
        dict(num_return_sequences=3, max_new_tokens=7),
        dict(num_return_sequences=3, min_new_tokens=12),
        dict(num_return_sequences=3, no_repeat_ngram_size=2, min_new_tokens=20, bad_words_ids=[[5], [7, 8]]),
        dict(num_return_sequences=3, max_new_tokens=1),
        dict(num_return_sequences=3, pad_token_id=9),
    ],
    ids=lambda options: " ".join(f"{name}={value}" for name, value in options.items()) or "defaults",
)
def test_sequences_and_scores_are_the_references(ours, theirs, prompts, ends, options):
    compare(ours, theirs, prompts, eos_token_id=ends, **options)


def test_beams_that_no_token_ends_are_the_references(ours, theirs, prompts):
    compare(ours, theirs, prompts, eos_token_id=None, num_return_sequences=3)


def compare(ours, theirs, prompts, **options):
    expected = their_beams(theirs("base"), prompts.inputs, **options)
    options["eos_token_id"] = -1 if options["eos_token_id"] is None else options["eos_token_id"]
    found = ours("base").generate(**prompts.inputs, **BEAMS | options)
    assert np.array_equal(found.sequences, expected.sequences.numpy())
    assert np.array_equal(found.beam_indices, expected.beam_indices.numpy())
    np.testing.assert_allclose(found.sequences_scores, expected.sequences_scores.numpy(), rtol=TOLERANCE)
    for name in ("scores", "logits"):
        # Without the padding of prompts, token 0, which the reference's repetition penalty counts.
        ours, theirs = (np.stack([np.asarray(step) for step in out[name]])[..., 1:] for out in (found, expected))
        largest = np.abs(theirs[np.isfinite(theirs)]).max()
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=TOLERANCE * largest)
