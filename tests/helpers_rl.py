"""A tiny model that samples and learns by reward, and prompts for it: texts, images and a video."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from glm4v_jax import Engine, Glm4vProcessor
from glm4v_jax.checkpoints.load import load_model
from glm4v_jax.config.generation import GenerationConfig
from glm4v_jax.config.model import Glm4vConfig
from glm4v_jax.inputs.media.load import SampledVideo
from glm4v_jax.inputs.prompt import Prompt
from glm4v_jax.model.runtime import Runtime
from glm4v_jax.tiny import TINY_CHECKPOINT
from train.config import BatchConfig
from train.data.placement import put, stacked
from train.rl import handover
from train.rl.groups import Group, Rollout, num_samples
from train.rl.handover import Handover
from train.rl.loss import Objective
from train.rl.packing import micro_batches
from train.rl.rollouts import media_tokens
from train.rl.step import PolicyStep, nothing
from train.state import Layout, init_state, split

BATCH = BatchConfig(rows=3, length=256, vision_rows=2, vision_length=128)


def messages(number, *, video=False):
    """A question about an image of its own, or about a video, or without either."""
    rng = np.random.default_rng(number)
    content = [{"type": "text", "text": "Which digit is this? " + "Say it. " * (number % 5)}]
    if video:
        frames = rng.integers(0, 256, (4, 56, 56, 3), np.uint8)
        content.insert(0, {"type": "video", "video": SampledVideo(frames, 2.0)})
    elif number % 4:
        image = rng.integers(0, 256, (56, 56 + 28 * (number % 3), 3), np.uint8)
        content.insert(0, {"type": "image", "image": image})
    return [{"role": "user", "content": content}]


class Learner:
    """The packaged model with all of its parameters trained, and an engine with its weights."""

    def __init__(self, mesh, batch=BATCH):
        self.mesh, self.batch = mesh, batch
        self.config = Glm4vConfig.from_pretrained(TINY_CHECKPOINT)
        self.processor = Glm4vProcessor.from_pretrained(TINY_CHECKPOINT)
        model = load_model(TINY_CHECKPOINT, self.config, dtype="float32", stacked=True)
        self.layout = Layout.of(model)
        self.params, self.frozen = split(model, lambda path: True)
        self.optimizer = optax.adam(1e-3)
        banned = media_tokens(self.config)
        self.objective = Objective(banned=banned)
        self.copied = jax.jit(lambda leaves: jax.tree.map(jnp.copy, leaves))
        self.step = PolicyStep(self.layout, self.optimizer, self.objective, dtype=jnp.float32, remat="none")
        with pytest.MonkeyPatch.context() as patch:
            # The layers stay stacked, and compile in the time of one; those of `test_loop.py` are as on every CPU.
            patch.setattr(handover, "platform", lambda: "gpu")
            self.handover = Handover(self.layout, self.params, self.frozen, jnp.float32, mesh)
            model = self.handover(self.params)
        runtime = Runtime.of(model, mesh, GenerationConfig())
        self.engine = Engine(runtime, self.processor, num_slots=16, capacity=256)
        self.options = dict(
            do_sample=True, temperature=1.0, top_k=0, top_p=1.0, suppress_tokens=banned, logprobs=0,
            logprobs_of="sampling", max_new_tokens=24,
        )  # fmt: skip

    def state(self):
        """A new state before the first step."""
        return init_state(self.copied(self.params), self.optimizer)

    def groups(self, prompts, *, samples=4, seed=0, **options):
        """Sample answers, with rewards that differ."""
        prompts = [prompt if isinstance(prompt, Prompt) else self.engine.prompt(prompt) for prompt in prompts]
        options = self.options | dict(seed=seed, eos_token_id=-1) | options
        found = sorted(self.engine.generate_many(prompts, samples=samples, **options), key=lambda one: one.index)
        rng, groups = np.random.default_rng(seed), []
        for number, prompt in enumerate(prompts):
            answers = tuple(Rollout.of(one) for one in found[number * samples : (number + 1) * samples])
            groups.append(Group(f"problem {number:03d}", prompt, answers, rng.permutation(samples) / samples))
        return groups

    def batches(self, groups, **options):
        """Packed micro-batches on the devices."""
        packed = micro_batches(groups, self.batch, self.config, **options)
        return [put(stacked([one]), self.mesh) for one in packed]

    def take(self, state, groups):
        """A step on these groups."""
        return self.step(state, self.frozen, self.batches(groups), num_samples(groups), 0)

    def sums(self, params, batches):
        """Gradients and sums of micro-batches."""
        found = nothing(params)
        for batch in batches:
            found = self.step.gradients(found, params, self.frozen, batch)
        return found
