"""A small stand-in for vLLM's engine: its configuration, tpu-inference's loader and step, pages, and attention.

It follows tpu-inference 0.32.0: `models/common/model_loader.py`, `layers/common/{attention_interface,
attention_metadata}.py`, `runner/{tpu_runner,kv_cache}.py`. JAX is imported in the functions: see `helpers_mesh`.
"""

import dataclasses
import functools
import re
import sys
import types
from types import SimpleNamespace

import numpy as np

PAGE, LANES = 8, 128
PAGES, MAX_SEQUENCES = 24, 4


def vllm_config(directory, **options):
    """What the model reads of vLLM's configuration; `options` are the attributes of the parts that have them."""
    limits = options.pop("limit_per_prompt", {})
    media = SimpleNamespace(
        limit_per_prompt=limits, enable_mm_embeds=False, video_pruning_rate=None, mm_processor_kwargs=None
    )
    parts = {
        "model_config": dict(model=str(directory), dtype="float32", runner_type="generate", multimodal_config=media),
        "parallel_config": dict(pipeline_parallel_size=1),
        "load_config": dict(load_format="auto"),
        "cache_config": dict(cache_dtype="auto"),
        "scheduler_config": dict(max_num_batched_tokens=64),
    }
    whole = {name: options.pop(name, None) for name in ("lora_config", "speculative_config", "additional_config")}
    for name, value in options.items():
        owner = next(part for part in [*parts.values(), vars(media)] if name in part)
        owner[name] = value
    return SimpleNamespace(**{name: SimpleNamespace(**part) for name, part in parts.items()}, **whole)


def paged_attention(q, k, v, cache, lengths, tables, starts, distribution, *, sm_scale=None, **options):
    """Attention over pages in plain operations, as tpu-inference's kernel `ragged_paged_attention`.

    q: [T, N, H]. k, v: [T, K, H]. cache: [pages, page, 2K / packing, packing, lanes], a head's keys beside its values.
    Returns [T, N, H] and the cache.
    """
    import jax
    import jax.numpy as jnp

    (tokens, heads, size), kv_heads, live = q.shape, k.shape[1], distribution[2]
    (pages, page), lanes = cache.shape[:2], cache.shape[-1]
    tables = tables.reshape(len(lengths), -1)
    token = jnp.arange(tokens)
    row = jnp.minimum(jnp.searchsorted(starts[1:], token, side="right"), len(lengths) - 1)
    position = lengths[row] - starts[row + 1] + token
    slot = jnp.where(token < starts[live], tables[row, position // page] * page + position % page, pages * page)
    new = jnp.pad(jnp.stack([k, v], axis=2), ((0, 0), (0, 0), (0, 0), (0, lanes - size)))
    new = new.reshape(tokens, *cache.shape[2:]).astype(cache.dtype)
    flat = cache.reshape(pages * page, *cache.shape[2:]).at[slot].set(new, mode="drop")
    cache = flat.reshape(cache.shape)

    def of_token(token):
        q, row, position = token
        keys, values = jnp.moveaxis(cache[tables[row]].reshape(-1, kv_heads, 2, lanes)[..., :size], 2, 0)
        scores = jnp.einsum("kgh,skh->kgs", q.reshape(kv_heads, -1, size), keys) * (sm_scale or size**-0.5)
        weights = jax.nn.softmax(jnp.where(jnp.arange(len(keys)) <= position, scores, -1e30))
        return jnp.einsum("kgs,skh->kgh", weights, values).reshape(heads, size).astype(q.dtype)

    return jax.lax.map(of_token, (q, row, position), batch_size=32), cache


def fake_attention(cache, q, k, v, metadata, mesh):
    """`paged_attention` on the heads of each device; as `attention_interface.attention`."""
    import jax
    from jax.sharding import PartitionSpec as P

    heads, pages, data = P("data", "model", None), P("data", None, "model", None, None), P("data")
    out, cache = jax.shard_map(
        paged_attention, mesh=mesh, in_specs=(heads, heads, heads, pages, data, data, data, data),
        out_specs=(heads, pages), check_vma=False,
    )(q, k, v, cache, metadata.seq_lens, metadata.block_tables, metadata.query_start_loc,
      metadata.request_distribution)  # fmt: skip
    return cache, out


@functools.cache
def metadata_class():
    import jax

    fields = [
        (name, object)
        for name in ("input_positions", "block_tables", "seq_lens", "query_start_loc", "request_distribution")
    ]
    return jax.tree_util.register_dataclass(dataclasses.make_dataclass("AttentionMetadata", fields))


def install_attention():
    """Let `tpu_inference`'s attention be found, without tpu-inference."""
    name = "tpu_inference.layers.common.attention_interface"
    module = types.ModuleType(name)
    module.attention = fake_attention
    sys.modules[name] = module


@dataclasses.dataclass
class Sequence:
    """Tokens of a sequence, its images or videos as vLLM has them, and how many tokens were computed."""

    tokens: list
    features: tuple = ()
    pages: list = dataclasses.field(default_factory=list)
    done: int = 0


class Runner:
    """Loads the model and runs steps as tpu-inference does, on a mesh of `size` devices."""

    def __init__(self, directory, size, **options):
        import jax
        import jax.numpy as jnp
        from flax import nnx
        from jax.sharding import AxisType, NamedSharding
        from jax.sharding import PartitionSpec as P

        from glm4v_jax.serve.vllm_plugin.model import Glm4vForVllm

        install_attention()
        devices = jax.devices()[:size]
        self.mesh = jax.make_mesh((1, size), ("data", "model"), axis_types=(AxisType.Auto,) * 2, devices=devices)
        config = vllm_config(directory, **options)
        with jax.set_mesh(self.mesh):
            model = nnx.eval_shape(lambda: Glm4vForVllm(config, jax.random.key(0), self.mesh), graph_updates=False)
            model.load_weights(jax.random.key(0))
            model = nnx.jit(lambda model: model, donate_argnums=0)(model)
        graph, state = nnx.split(model)
        self.leaves, structure = jax.tree.flatten(state)

        def merged(leaves):
            return nnx.merge(graph, jax.tree.unflatten(structure, leaves))

        self.model = merged(self.leaves)
        text = model.engine.config.text_config
        shape = (PAGES, PAGE, 2 * text.num_key_value_heads, 1, LANES)
        sharding = NamedSharding(self.mesh, P("data", None, "model"))
        self.layers = tuple((f"layer.{i}", i) for i in range(text.num_hidden_layers))
        self.caches = [jax.device_put(jnp.zeros(shape), sharding) for _ in self.layers]
        hidden = NamedSharding(self.mesh, P("data", None))
        self.step = jax.jit(
            lambda leaves, *args: merged(leaves)(*args), donate_argnums=1, static_argnums=(6, 9, 10),
            out_shardings=([sharding] * len(self.layers), hidden, hidden, None),
        )  # fmt: skip
        self.logits = jax.jit(
            lambda leaves, hidden: merged(leaves).compute_logits(hidden),
            out_shardings=NamedSharding(self.mesh, P("data", "model")),
        )
        self.embed = jax.jit(
            lambda leaves, ids, features, mask: merged(leaves).embed_input_ids(ids, features, is_multimodal=mask),
            out_shardings=NamedSharding(self.mesh, P()),
        )
        self.free = list(np.random.default_rng(0).permutation(PAGES))

    def run(self, scheduled, width):
        """Compute the next `count` tokens of each (sequence, count), in a step of `width` tokens; logits of each."""
        import jax
        import jax.numpy as jnp

        ids, positions = np.zeros(width, np.int32), np.zeros((3, width), np.int32)
        starts, lengths = np.zeros(MAX_SEQUENCES + 1, np.int32), np.zeros(MAX_SEQUENCES, np.int32)
        tables = np.zeros((MAX_SEQUENCES, PAGES // MAX_SEQUENCES), np.int32)
        mask, features = np.zeros(width, bool), []
        with jax.set_mesh(self.mesh):
            model = self.model
            for row, (sequence, count) in enumerate(scheduled):
                begin, end = sequence.done, sequence.done + count
                here = slice(starts[row], starts[row] + count)
                ids[here] = sequence.tokens[begin:end]
                own, _ = model.get_mrope_input_positions(sequence.tokens, sequence.features)
                positions[:, here] = own[:, begin:end]
                while len(sequence.pages) * PAGE < end:
                    sequence.pages.append(self.free.pop())
                tables[row, : len(sequence.pages)] = sequence.pages
                starts[row + 1 :], lengths[row] = starts[row] + count, end
                for feature in sequence.features:
                    found = (slots := feature.mm_position.embeds) - begin + starts[row]
                    inside = (slots >= begin) & (slots < end)
                    mask[found[inside]] = True
                    (encoded,) = model.embed_multimodal(**{name: field.data for name, field in feature.data.items()})
                    features.append(encoded[: len(slots)][inside])
                sequence.done = end
            embeds = None
            if features:
                flat = jnp.concatenate(features)
                flat = jnp.pad(flat, ((0, width - len(flat)), (0, 0)))
                embeds = self.embed(self.leaves, ids, flat, mask)
            distribution = np.array([0, 0, len(scheduled)], np.int32)
            metadata = metadata_class()(positions, tables.ravel(), lengths, starts, distribution)
            arguments = self.arguments(None if features else ids, metadata, embeds)
            self.caches, hidden, _, _ = self.step(*arguments)
            logits = np.asarray(self.logits(self.leaves, hidden))
        return [logits[starts[row] : starts[row + 1]] for row in range(len(scheduled))]

    def arguments(self, ids, metadata, embeds=None):
        return self.leaves, self.caches, ids, metadata, embeds, None, self.layers, None, None, True, True

    def collectives(self, width):
        """The collectives of a compiled step of `width` tokens, by their names in XLA."""
        import jax

        rows, tables = np.zeros(MAX_SEQUENCES, np.int32), np.zeros(PAGES, np.int32)
        metadata = metadata_class()(np.zeros((3, width), np.int32), tables, rows, np.zeros(5, np.int32), rows[:3])
        with jax.set_mesh(self.mesh):
            step = self.step.lower(*self.arguments(np.zeros(width, np.int32), metadata)).compile()
        return re.findall(r" (all-\w+|reduce-scatter|collective-\w+)\(", step.as_text())


def feature(modality, grid, offset, tokens, pixels, image_token_id):
    """An image or video as vLLM's scheduler hands it on: `MultiModalFeatureSpec`."""
    grid, length = np.asarray(grid), len(tokens)
    embeds = offset + np.flatnonzero(np.asarray(tokens) == image_token_id)
    values = "pixel_values" if modality == "image" else "pixel_values_videos"
    data = {values: SimpleNamespace(data=pixels), f"{modality}_grid_thw": SimpleNamespace(data=grid[None])}
    place = SimpleNamespace(offset=offset, length=length, embeds=embeds)
    return SimpleNamespace(modality=modality, data=data, mm_position=place)
