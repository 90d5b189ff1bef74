"""`model.generate` in the reference's shapes: a padded batch of prompts in, a padded batch of tokens out."""

import hashlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from glm4v_jax.config.generation import GenerationConfig
from glm4v_jax.devices.distributed import agree, spans_processes, to_host
from glm4v_jax.devices.mesh import data_shards, use_mesh
from glm4v_jax.errors import GenerationError
from glm4v_jax.generate.prefill_chunks import Start
from glm4v_jax.generate.slots import Slots
from glm4v_jax.inputs.prompt import prompts_of, token_array
from glm4v_jax.inputs.vision_rows import bucket
from glm4v_jax.model.runtime import Runtime

# Outputs of processors that generation does not need.
_NOT_NEEDED = ("mm_token_type_ids", "token_type_ids", "video_metadata", "rope_deltas", "use_cache")
_OF_THE_ENGINE = {"stop_strings": (), "think_budget": None, "stop_repetition": False, "logprobs": None}


def generate(
    runtime: Runtime,
    input_ids: np.ndarray,
    *,
    attention_mask: np.ndarray | None = None,
    pixel_values: np.ndarray | None = None,
    image_grid_thw: np.ndarray | None = None,
    pixel_values_videos: np.ndarray | None = None,
    video_grid_thw: np.ndarray | None = None,
    generation_config: GenerationConfig | None = None,
    **options: Any,
) -> np.ndarray:
    """Continue prompts.

    Args:
      runtime: the model.
      input_ids: int [B, T], padded on either side where `attention_mask` is 0.
      attention_mask: int [B, T].
      pixel_values, image_grid_thw, pixel_values_videos, video_grid_thw: as the processor makes them.
      generation_config: in place of the checkpoint's generation_config.json.
      **options: fields of `GenerationConfig`, which win over it: max_new_tokens, do_sample, temperature, top_p, top_k,
        min_p, repetition_penalty, num_return_sequences, eos_token_id (-1 never stops), pad_token_id, seed.

    Returns:
      int64 [B * num_return_sequences, T + new]: the prompts as given, then the new tokens; rows that ended early are
      filled with the padding token.

    Raises:
      GenerationError: an option is unknown or out of its range, or prompt and new tokens exceed
        `max_position_embeddings`.
      MessageError: prompts and media do not match.
    """
    for name in _NOT_NEEDED:
        options.pop(name, None)
    config = (generation_config or runtime.generation_config).replace(**options)
    for name, off in _OF_THE_ENGINE.items():
        if (found := getattr(config, name)) != off:
            raise GenerationError(f"{name}: found {found!r}; expected {off!r}: it needs text, use glm4v_jax.Engine")
    input_ids = token_array(input_ids)
    num_new = config.new_tokens(input_ids.shape[-1], runtime.config.text_config.max_position_embeddings)
    inputs = {
        "input_ids": input_ids, "attention_mask": attention_mask, "pixel_values": pixel_values,
        "image_grid_thw": image_grid_thw, "pixel_values_videos": pixel_values_videos, "video_grid_thw": video_grid_thw,
    }  # fmt: skip
    if spans_processes(runtime.mesh):
        agree("inputs", _digest(inputs, config))
    copies = config.num_return_sequences
    prompts = [prompt for prompt in prompts_of(inputs, runtime.config) for _ in range(copies)]
    starts = {row: Start(prompt, config, num_new, number=row) for row, prompt in enumerate(prompts)}

    new = np.full((len(prompts), num_new), config.padding_id, np.int64)
    with use_mesh(runtime.mesh):
        shards = data_shards()
    slots = Slots(runtime, shards * bucket(-(-len(prompts) // shards)))
    first = slots.start(starts, together=True)
    made = np.ones(len(prompts), np.int64)
    done = np.full(1, num_new == 1)
    while not done.all():
        chosen, counts, done = slots.read(slots.decode())
        for row, count in enumerate(counts[: len(prompts)].tolist()):
            new[row, made[row] : made[row] + count] = chosen.tokens[row, :count]
            made[row] += count
    new[:, 0] = to_host(first.tokens)[: len(prompts)]
    return np.concatenate([np.repeat(input_ids, copies, axis=0), new[:, : made.max()]], axis=1).astype(np.int64)


def _digest(inputs: Mapping[str, Any], config: GenerationConfig) -> bytes:
    """16 bytes, equal for equal requests."""
    digest = hashlib.blake2b(repr(config).encode(), digest_size=16)
    for name, value in inputs.items():
        if value is not None:
            array = np.ascontiguousarray(value)
            digest.update(f"{name} {array.shape}".encode())
            digest.update(array.data)
    return digest.digest()
