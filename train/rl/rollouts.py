"""Answers to the prompts of a step, sampled by the engine from the weights of the moment."""

import concurrent.futures
import hashlib
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from glm4v_jax.config.model import Glm4vConfig
from glm4v_jax.generate.completion import Completion
from glm4v_jax.generate.engine import Engine
from glm4v_jax.generate.prompt import chat_variables
from glm4v_jax.inputs.prompt import Prompt
from train.rl.config import RLConfig
from train.rl.groups import Group, Rollout

_THREADS = 4
"""Prompts that are prepared at a time."""


class Answers(NamedTuple):
    """The sampled answers to one prompt, in the order of their numbers."""

    prompt: Prompt
    completions: tuple[Completion, ...]

    def group(self, key: str, rewards: Sequence[float], truncated: str) -> Group:
        """Return what is learned from, by the rewards of the answers; for `truncated` see `RLConfig`."""
        rollouts, values = list[Rollout](), list[float]()
        for one, reward in zip(self.completions, rewards, strict=True):
            rollout = Rollout.of(one)
            rollouts.append(rollout.masked() if is_cut(one) and truncated == "mask" else rollout)
            values.append(value_of(one, reward, truncated))
        return Group(key, self.prompt, tuple(rollouts), np.array(values))


def is_cut(completion: Completion) -> bool:
    """Return whether an answer ended at the limit of tokens."""
    return completion.finish_reason == "length"


def value_of(completion: Completion, reward: float, truncated: str) -> float:
    """Return what an answer's reward counts; see `RLConfig.truncated`."""
    return 0.0 if is_cut(completion) and truncated == "zero" else reward


def answer_text(completion: Completion) -> str:
    """Return what verifiers read: the text, after the begin of a thought that the prompt has opened."""
    return ("<think>" if completion.thinking.begins_open else "") + completion.text


def media_tokens(config: Glm4vConfig) -> tuple[int, ...]:
    """Return the tokens of images and videos, which answers must not have: as text they mean nothing."""
    names = (f"{kind}{part}_token_id" for kind in ("image", "video") for part in ("", "_start", "_end"))
    return tuple(sorted({getattr(config, name) for name in names}))


def sampling_options(config: RLConfig, model: Glm4vConfig) -> dict[str, Any]:
    """Return the options of all rollouts; those of the checkpoint's generation_config.json that matter are replaced.

    >>> from train.rl.config import SamplingConfig, VerifierConfig
    >>> sampling = SamplingConfig(think_budget=6, answer_budget=4)
    >>> config = RLConfig(verifiers={"math": VerifierConfig(kind="math")}, sampling=sampling, truncated="mask")
    >>> sampling_options(config, Glm4vConfig.tiny())["max_new_tokens"]
    10
    """
    sampling = config.sampling
    budgets: dict[str, Any] = {"max_new_tokens": sampling.longest}
    if config.truncated == "force" or not sampling.think_budget:
        budgets = {"think_budget": sampling.think_budget, "answer_budget": sampling.answer_budget}
    return {
        "do_sample": True, "temperature": sampling.temperature, "top_k": sampling.top_k, "top_p": sampling.top_p,
        "min_p": 0.0, "repetition_penalty": 1.0, "no_repeat_ngram_size": 0, "min_new_tokens": 0, "bad_words_ids": (),
        "sequence_bias": (), "suppress_tokens": media_tokens(model), **budgets,
    }  # fmt: skip


def sample(
    engine: Engine,
    prompts: Sequence[Any],
    config: RLConfig,
    seed: int,
    check: Callable[[int, Prompt], None] = lambda number, prompt: None,
) -> list[Answers]:
    """Sample `config.samples` answers to each prompt, from one prefill.

    Answer j to prompt i depends on (seed, i, j) alone, besides the weights. `check` is called with the number of each
    prompt and what it is made to; it may raise. Glm4vError if a prompt cannot be prepared.
    """
    options = sampling_options(config, engine.runtime.config) | {"logprobs": 0, "logprobs_of": "sampling"}
    variables = chat_variables({}, engine.config(**options), engine.processor)

    def prepare(number: int, asked: Any) -> Prompt:
        prompt = engine.prompt(asked, **variables)
        check(number, prompt)
        return prompt

    with concurrent.futures.ThreadPoolExecutor(_THREADS, "prompts") as pool:
        prepared = [pool.submit(prepare, *one) for one in enumerate(prompts)]
        found = list(
            engine.generate_many((one.result() for one in prepared), samples=config.samples, seed=seed, **options)
        )
    found.sort(key=lambda one: one.index)
    n = config.samples
    return [Answers(one.result(), tuple(found[i * n : (i + 1) * n])) for i, one in enumerate(prepared)]


def seed_of(seed: int, of: int | str) -> int:
    """Return the seed of the rollouts of a step, by its number, or of a problem, by its key."""
    return int.from_bytes(hashlib.blake2b(f"{seed} {of}".encode(), digest_size=4).digest(), "little")
