"""The clipped objective against a reference in torch, with gradients of every tensor."""

import jax
import numpy as np
import pytest
from reference import CONFIGS, Prompts, assert_gradients_equal, export, to_torch

from glm4v_jax import make_batch
from glm4v_jax.checkpoints.load import load_model
from glm4v_jax.config.model import Glm4vConfig
from train.data.packing import TrainBatch
from train.rl.loss import Objective, policy_loss

pytestmark = [pytest.mark.usefixtures("mesh"), pytest.mark.slow]

CONFIG = Glm4vConfig.from_dict(CONFIGS["base"])
ROWS = [[11], [2, ("image", (4, 6)), 3, ("image", (2, 2)), 8], [30]]
OBJECTIVE = Objective(low=0.2, high=0.28, temperature=0.7, banned=(5, 70, 71))


def torch_loss(logits, labels, before, advantages, counts):
    """GRPO with a high clip of its own, averaged over the tokens of each answer, then over answers."""
    import torch

    logits = logits[:, :-1].clone()
    logits[..., list(OBJECTIVE.banned)] = -torch.inf
    logprobs = torch.log_softmax(logits / OBJECTIVE.temperature, dim=-1)
    counts = counts[:, :-1]
    found = torch.gather(logprobs, -1, torch.where(counts, labels, 0)[..., None])[..., 0]
    ratio = torch.exp(torch.where(counts, found - before[:, :-1], 0.0))
    a = advantages[:, None]
    clipped = torch.clip(ratio, 1 - OBJECTIVE.low, 1 + OBJECTIVE.high)
    each = torch.where(counts, torch.minimum(ratio * a, clipped * a), 0.0)
    probabilities = torch.exp(logprobs)
    entropy = -torch.where(probabilities > 0, probabilities * logprobs, 0.0).sum(-1)
    told = {
        "ratio": ratio[counts].sum(),
        "deviation": (ratio[counts] - 1).abs().sum(),
        "largest": (ratio[counts] - 1).abs().max(),
        "low": ((ratio < 1 - OBJECTIVE.low) & (a < 0) & counts).sum(),
        "high": ((ratio > 1 + OBJECTIVE.high) & (a > 0) & counts).sum(),
        "divergence": (ratio - 1 - torch.log(ratio))[counts].sum(),
        "entropy": entropy[counts].sum(),
    }
    return -(each.sum(1) / counts.sum(1)).mean(), told


def test_loss_and_gradients_equal_torch(checkpoints, theirs):
    import torch

    reference, model = theirs("base"), load_model(checkpoints("base"), CONFIG)
    prompts, rng = Prompts(CONFIG, ROWS, padding="right", seed=1), np.random.default_rng(2)
    inputs, _ = make_batch(config=CONFIG, **prompts.inputs)
    size, shape = prompts.real.shape[1], inputs.input_ids.shape
    targets, counts = np.zeros(shape, np.int32), np.zeros(shape, bool)
    targets[:, : size - 1] = prompts.input_ids[:, 1:]
    counts[:, : size - 1] = (prompts.real & (prompts.input_ids != CONFIG.image_token_id))[:, 1:]
    counts &= ~np.isin(targets, OBJECTIVE.banned) & (rng.random(shape) < 0.8)  # the others were not drawn
    advantages = np.array([1.2, -0.7, -0.4], np.float32)
    before = np.where(counts, -6.7 + 0.5 * rng.standard_normal(shape), 0).astype(np.float32)

    reference.zero_grad(set_to_none=True)
    reference.model.rope_deltas = None
    torch_of = [torch.from_numpy(x[:, :size]) for x in (before, counts)]
    labels = torch.from_numpy(targets[:, : size - 1]).long()
    logits = reference(**to_torch(prompts.inputs)).logits
    expected, told = torch_loss(logits, labels, torch_of[0], torch.from_numpy(advantages), torch_of[1])
    expected.backward()

    weights = (counts / counts.sum(1, keepdims=True)).astype(np.float32)
    rows = np.broadcast_to(advantages[:, None], shape)
    batch = TrainBatch(inputs, targets, weights, reference=before, advantages=rows)

    def loss(model):
        sums = policy_loss(model, model(inputs), batch, OBJECTIVE, chunk=16)
        return sums.loss / 3, sums

    (found, sums), gradient = jax.jit(jax.value_and_grad(loss, has_aux=True))(model)
    np.testing.assert_allclose(found, expected.item(), rtol=1e-5)
    for name, value in told.items():
        np.testing.assert_allclose(getattr(sums, name), value.item(), rtol=1e-5, err_msg=name)
    assert float(sums.tokens) == counts.sum() and float(sums.low) > 3 and float(sums.high) > 3
    assert_gradients_equal(export(gradient, CONFIG), reference)
