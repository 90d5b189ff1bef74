"""`model.generate` in the reference's shapes: a padded batch of prompts in, a padded batch of tokens out."""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from glm4v_jax.config.checks import CacheDtype
from glm4v_jax.config.generation import GenerationConfig
from glm4v_jax.config.grammar import KINDS
from glm4v_jax.devices.distributed import agree, spans_processes, to_host
from glm4v_jax.devices.mesh import data_shards
from glm4v_jax.errors import GenerationError
from glm4v_jax.generate.beam_search import Beams, search
from glm4v_jax.generate.device_steps import Chosen, Variant
from glm4v_jax.generate.prefill_chunks import Start
from glm4v_jax.generate.scheduler import SHARED_STEPS, DispatchSize
from glm4v_jax.generate.slots import MAX_STEPS, Slots, check_cache_dtype
from glm4v_jax.generate.text.stream import TokenStops
from glm4v_jax.hf.outputs import GenerateBeamDecoderOnlyOutput, GenerateDecoderOnlyOutput
from glm4v_jax.inputs.prompt import prompts_of, token_array
from glm4v_jax.inputs.text.tokenizer import Glm4vTokenizer
from glm4v_jax.inputs.vision_rows import bucket
from glm4v_jax.model.runtime import Runtime

# Outputs of processors that generation does not need.
_NOT_NEEDED = ("mm_token_type_ids", "token_type_ids", "video_metadata", "rope_deltas", "use_cache")
_OF_THE_ENGINE: dict[str, Any] = {
    "think_budget": None, "stop_repetition": False, "logprobs": None, "logprobs_of": "model",
    **dict.fromkeys(KINDS, None),
}  # fmt: skip


def generate(
    runtime: Runtime,
    input_ids: np.ndarray,
    *,
    attention_mask: np.ndarray | None = None,
    pixel_values: np.ndarray | None = None,
    image_grid_thw: np.ndarray | None = None,
    pixel_values_videos: np.ndarray | None = None,
    video_grid_thw: np.ndarray | None = None,
    generation_config: Any = None,
    tokenizer: Glm4vTokenizer | None = None,
    streamer: Any = None,
    cache_dtype: CacheDtype = "auto",
    **options: Any,
) -> Any:
    """Continue prompts.

    Args:
      runtime: the model.
      input_ids: int [B, T], padded on either side where `attention_mask` is 0.
      attention_mask: int [B, T].
      pixel_values, image_grid_thw, pixel_values_videos, video_grid_thw: as the processor makes them.
      generation_config: a `GenerationConfig`, in place of the checkpoint's generation_config.json; or one of
        transformers, over it.
      tokenizer: for `stop_strings`; a row ends with the token that completes one, which may begin in its prompt.
      streamer: an object with `put(tokens)` and `end()`, such as transformers' `TextStreamer`; it is given the prompts
        [B, T], then the new tokens [B] of each step.
      cache_dtype: see `Engine`.
      **options: fields of `GenerationConfig`, which win over it.

    Returns:
      int64 [B * num_return_sequences, T + new]: the prompts as given, then the new tokens; rows that ended early are
      filled with the padding token. With `return_dict_in_generate` that and more as a `GenerateDecoderOnlyOutput`, or
      with `num_beams` as a `GenerateBeamDecoderOnlyOutput`.

    Raises:
      GenerationError: an option is unknown or out of its range, or prompt and new tokens exceed
        `max_position_embeddings`.
      MessageError: prompts and media do not match.
    """
    check_cache_dtype(cache_dtype)
    for name in _NOT_NEEDED:
        options.pop(name, None)
    config = runtime.generation_config.overridden(generation_config).replace(**options)
    for name, off in _OF_THE_ENGINE.items():
        if (found := getattr(config, name)) != off:
            raise GenerationError(f"{name}: found {found!r}; expected {off!r}, or glm4v_jax.Engine, which has it")
    if config.stop_strings and tokenizer is None:
        raise GenerationError(
            f"stop_strings: found {config.stop_strings!r} without a tokenizer; expected tokenizer=processor.tokenizer"
        )
    if config.num_beams > 1 and streamer is not None:
        raise GenerationError(f"streamer: found one beside num_beams={config.num_beams}; expected one of the two")
    config.check_vocabulary(runtime.config.text_config.vocab_size)
    input_ids = token_array(input_ids)
    num_new = config.new_tokens(input_ids.shape[-1], runtime.config.text_config.max_position_embeddings)
    inputs = {
        "input_ids": input_ids, "attention_mask": attention_mask, "pixel_values": pixel_values,
        "image_grid_thw": image_grid_thw, "pixel_values_videos": pixel_values_videos, "video_grid_thw": video_grid_thw,
    }  # fmt: skip
    shared = spans_processes(runtime.mesh)
    if shared:
        agree("inputs", _digest(inputs, config, cache_dtype))
    copies = config.num_return_sequences
    rows_of_each = copies if config.num_beams == 1 else 1
    prompts = [prompt for prompt in prompts_of(inputs, runtime.config) for _ in range(rows_of_each)]
    starts = {row: Start(prompt, config, num_new, number=row) for row, prompt in enumerate(prompts)}
    with runtime.on_mesh():
        shards = data_shards()
    num_rows = shards * bucket(-(-len(prompts) // shards))
    slots = Slots(runtime, num_rows, variant=Variant.of(config), cache_dtype=cache_dtype)
    if config.num_beams > 1:
        output = _best_beams(*search(slots, starts, config), input_ids, config)
        return output if config.return_dict_in_generate else output.sequences
    ends = list[TokenStops]()
    if tokenizer is not None and config.stop_strings:
        ends = [TokenStops(config.stop_strings, tokenizer, prompt.input_ids.tolist()) for prompt in prompts]
    # A steady stream, where somebody reads it.
    pace = DispatchSize(MAX_STEPS if streamer is None else SHARED_STEPS if shared else None)
    blocks = list[Block]()
    if streamer is not None:
        streamer.put(input_ids)
    for block in _blocks(slots, starts, num_new, ends, pace):
        blocks.append(block)
        if streamer is not None:
            for column in np.where(block.valid, block.chosen.tokens, config.padding_id).T:
                streamer.put(column.astype(np.int64))
    if streamer is not None:
        streamer.end()
    new = np.concatenate([np.where(valid, chosen.tokens, config.padding_id) for chosen, valid in blocks], axis=1)
    sequences = np.concatenate([np.repeat(input_ids, copies, axis=0), new], axis=1).astype(np.int64)
    if not config.return_dict_in_generate:
        return sequences
    return GenerateDecoderOnlyOutput(
        sequences,
        scores=_steps(blocks, [block.chosen.scores for block in blocks]) if config.output_scores else None,
        logits=_steps(blocks, [block.chosen.logits for block in blocks]) if config.output_logits else None,
    )


class Block(NamedTuple):
    """What n decode steps chose, in NumPy: [B, n, ...], and bool [B, n], False after a row's end."""

    chosen: Chosen
    valid: np.ndarray


def _blocks(
    slots: Slots, starts: Mapping[int, Start], num_new: int, ends: Sequence[TokenStops], pace: DispatchSize
) -> Iterator[Block]:
    """Generate at most `num_new` tokens, until all rows have ended, by `ends` too where there are stop strings.

    All rows begin together, the first at slot 0.
    """
    count, rest = len(starts), list[Block]()
    stopped = np.zeros(slots.num_rows, np.bool_)

    def block(chosen: Chosen, counts: np.ndarray) -> Block:
        valid = (np.arange(chosen.tokens.shape[1]) < counts[:, None]) & ~stopped[:, None]
        for row, end in enumerate(ends):
            for column in np.flatnonzero(valid[row]):
                if end.push(int(chosen.tokens[row, column])):
                    valid[row, column + 1 :], stopped[row] = False, True
                    break
        steps = int(valid[:count].any(axis=0).sum())
        return Block(jax.tree.map(lambda x: x[:count, :steps], chosen), valid[:count, :steps])

    first = slots.start(starts, together=True)
    decoded = slots.decode(pace.begin()) if num_new > 1 else None
    first = jax.tree.map(lambda x: x[:, None], to_host(first))
    yield block(first, np.ones(slots.num_rows, np.int32))
    while decoded is not None:
        chosen, counts, done = slots.read(decoded)
        pace.end()
        made = block(chosen, counts)
        if surplus := np.flatnonzero(stopped & ~done).tolist():
            slots.stop(surplus)
        ended = done | stopped
        decoded = None if ended.all() else slots.decode(pace.begin())
        if slots.variant.draft is not None:
            # Rows get different numbers of tokens: what others have not got yet waits for them.
            made = _joined([*rest, made])
            counts = made.valid.sum(axis=1)
            ready = int(counts.max() if ended.all() else counts[~ended[:count]].min())
            made, *rest = (
                jax.tree.map(lambda x, part=part: x[:, part], made) for part in (slice(ready), slice(ready, None))
            )
        yield made


def _joined(blocks: Sequence[Block]) -> Block:
    """One block after the other, in each row what is valid first."""
    joined = jax.tree.map(lambda *xs: np.concatenate(xs, axis=1), *blocks)
    order = np.argsort(~joined.valid, axis=1, kind="stable")
    return jax.tree.map(lambda x: np.take_along_axis(x, order.reshape(*order.shape, *(1,) * (x.ndim - 2)), 1), joined)


def _best_beams(
    beams: Beams, blocks: Sequence[Chosen], input_ids: np.ndarray, config: GenerationConfig
) -> GenerateBeamDecoderOnlyOutput:
    """The prompts, each as often as asked for, and the tokens of their best beams."""
    count = config.num_return_sequences
    tokens, parents, scores = (x[: len(input_ids), :count] for x in beams)
    # As many as the longest of these has.
    length = (parents >= 0).sum(axis=-1).max()
    rows = parents + config.num_beams * np.arange(len(input_ids), dtype=np.int32)[:, None, None]
    tokens, rows = (x[..., :length].reshape(-1, length) for x in (tokens, np.where(parents < 0, -1, rows)))
    sequences = np.concatenate([np.repeat(input_ids, count, axis=0), tokens], axis=1).astype(np.int64)
    used = len(input_ids) * config.num_beams
    chosen = jax.tree.map(lambda *xs: tuple(np.concatenate(xs, axis=1)[:used].swapaxes(0, 1)), *blocks)
    return GenerateBeamDecoderOnlyOutput(
        sequences, scores.reshape(-1) if config.output_scores else None, chosen.scores, chosen.logits, rows
    )


def _steps(blocks: Sequence[Block], values: Sequence[Any]) -> tuple[np.ndarray, ...]:
    """[B, n, V] of each block -> [B, V] of each step; zeros after a row's end."""
    pairs = [(block.valid, value) for block, value in zip(blocks, values, strict=True)]
    return tuple(np.where(valid[:, i, None], value[:, i], 0) for valid, value in pairs for i in range(valid.shape[1]))


def _digest(inputs: Mapping[str, Any], *options: Any) -> bytes:
    """16 bytes, equal for equal requests."""
    digest = hashlib.blake2b(repr(options).encode(), digest_size=16)
    for name, value in inputs.items():
        if value is not None:
            array = np.ascontiguousarray(value)
            digest.update(f"{name} {array.shape}".encode())
            digest.update(array.data)
    return digest.digest()
