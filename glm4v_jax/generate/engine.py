"""Generation for a batch of prompts: encode, prefill, decode.

Prompts are left-aligned, so that row b's tokens fill slots 0 to len(b) - 1 whichever side its padding was on. All
shapes come from bucket sets: prompts, cache slots, rows, vision rows. A warm bucket compiles nothing.
"""

from typing import TYPE_CHECKING, Any

import numpy as np

from glm4v_jax.generate import programs
from glm4v_jax.generate.config import GenerationConfig, SamplingParams
from glm4v_jax.generate.sampling import row_keys
from glm4v_jax.inputs.packing import bucket
from glm4v_jax.inputs.prepare import make_batch, token_array
from glm4v_jax.mesh import data_shards, use_mesh

if TYPE_CHECKING:
    from glm4v_jax.modeling import Glm4vForConditionalGeneration

STEPS_PER_DISPATCH = 16
MIN_CAPACITY = 64
MIN_EOS = 8

# What processors make for other models' sake and generation does not need.
_NOT_NEEDED = ("mm_token_type_ids", "token_type_ids", "video_metadata", "rope_deltas", "use_cache")


def generate(
    model: "Glm4vForConditionalGeneration",
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
      model: whose.
      input_ids: int [B, T], padded on either side where `attention_mask` is 0.
      attention_mask: int [B, T].
      pixel_values, image_grid_thw, pixel_values_videos, video_grid_thw: as the processor makes them.
      generation_config: in place of the checkpoint's generation_config.json.
      **options: fields of `GenerationConfig`, which win over it: max_new_tokens, do_sample, temperature, top_p, top_k,
        min_p, repetition_penalty, num_return_sequences, eos_token_id (-1 never stops), pad_token_id, seed.

    Returns:
      int64 [B * num_return_sequences, T + new]: the prompts as given, and what follows; rows that ended early go on
      with the padding token.

    Raises:
      GenerationError: an option is unknown or out of its range, or prompt and new tokens exceed
        `max_position_embeddings`.
      MessageError: prompts and media do not match.
    """
    for name in _NOT_NEEDED:
        options.pop(name, None)
    config = (generation_config or model.generation_config).replace(**options)
    input_ids = token_array(input_ids)
    text_config = model.config.text_config
    num_new = config.new_tokens(input_ids.shape[-1], text_config.max_position_embeddings)

    with use_mesh(model.mesh):
        copies = config.num_return_sequences
        shards = data_shards()
        rows = len(input_ids) * copies
        padded_rows = shards * bucket(-(-rows // shards))
        batch, next_position = make_batch(
            input_ids, model.config, attention_mask=attention_mask, pixel_values=pixel_values,
            image_grid_thw=image_grid_thw, pixel_values_videos=pixel_values_videos, video_grid_thw=video_grid_thw,
            batch_multiple=shards,
        )  # fmt: skip
        # Copies of a prompt refer to the same vision tokens, which are encoded once.
        take = np.minimum(np.arange(padded_rows), rows - 1) // copies
        real = np.arange(padded_rows) < rows
        batch = batch._replace(
            input_ids=batch.input_ids[take],
            segment_ids=batch.segment_ids[take] * real[:, None].astype(np.int32),
            position_ids=batch.position_ids[:, take],
            vision_index=None if batch.vision_index is None else batch.vision_index[take],
        )
        lengths = batch.segment_ids.sum(axis=1)
        deltas = (next_position[take] - lengths).astype(np.int32)
        t = batch.input_ids.shape[1]
        capacity = bucket(max(t, int(lengths.max()) + num_new), MIN_CAPACITY)

        text, head = model.language_model.flat, model.lm_head
        sampling = sampling_of(config, padded_rows)
        state = programs.prefill(
            text, head, model.model.embed(batch), batch.input_ids, batch.position_ids, batch.segment_ids,
            model.language_model.init_cache(padded_rows, capacity), deltas, sampling,
        )  # fmt: skip
        columns = [np.asarray(state.tokens)[:, None]]
        made = 1
        while made < num_new:
            tokens, count, state = programs.decode(
                text, head, state, sampling, STEPS_PER_DISPATCH, np.int32(num_new - made)
            )
            if not (count := int(count)):
                break
            columns.append(np.asarray(tokens)[:, :count])
            made += count
    new = np.concatenate(columns, axis=1)[:rows]
    return np.concatenate([np.repeat(input_ids, copies, axis=0), new], axis=1).astype(np.int64)


def sampling_of(config: GenerationConfig, rows: int) -> programs.Sampling:
    """How `rows` rows choose their tokens, as the programs take it."""
    eos = np.full(bucket(len(config.eos_token_id), MIN_EOS), -1, np.int32)
    eos[: len(config.eos_token_id)] = config.eos_token_id
    params = SamplingParams.of(config, rows)
    return programs.Sampling(params, row_keys(config.seed, rows), eos, np.int32(config.padding_id))
