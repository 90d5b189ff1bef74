"""Writes the random checkpoint of the tests: GLM-4.1V's shape in Hugging Face layout, tiny, with random weights.

    python -m tools.make_random [DIRECTORY]

Same bytes every time and on every machine: the numbers come from PCG64's raw bits, which NumPy promises to keep, and
nothing but additions, multiplications and roundings is done to them. File names, tensor names and the two shards follow
the released GLM-4.1V-9B-Thinking.
"""

import json
import math
import struct
import sys
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from tokenizers import Tokenizer

from tools import tiny_text
from tools.tiny_assets import Vocabulary, asset_files, json_bytes, model_config, train_tokenizer, write_files

DEFAULT_DIRECTORY = Path(__file__).resolve().parent.parent / "tests" / "random_checkpoint"

VOCABULARY = Vocabulary(learned=768, rows=832, text=tiny_text.TRAINING_TEXT)

TEXT = {
    "hidden_size": 64,
    "initializer_range": 0.02,
    "intermediate_size": 96,
    "num_attention_heads": 4,
    "num_hidden_layers": 2,
    "num_key_value_heads": 2,
    "rope_scaling": {"rope_type": "default", "mrope_section": [1, 1, 2]},
}
VISION = {
    "depth": 2,
    "hidden_size": 48,
    "image_size": 336,
    "initializer_range": 0.02,
    "intermediate_size": 96,
    "num_heads": 4,
    "out_hidden_size": 64,
}


class Tensor(NamedTuple):
    """How a tensor is drawn: uniformly around `centre`, with standard deviation `deviation`."""

    name: str
    shape: tuple[int, ...]
    deviation: float
    centre: float = 0.0


def linear(name: str, features_out: int, *features_in: int) -> Tensor:
    """A weight [out, in, ...] that keeps the variance of its input."""
    return Tensor(f"{name}.weight", (features_out, *features_in), 1 / math.sqrt(math.prod(features_in)))


def scale(name: str, features: int) -> Tensor:
    """A norm's weight: near one, but not so near that leaving it out goes unnoticed."""
    return Tensor(f"{name}.weight", (features,), 0.1, 1.0)


def bias(name: str, features: int) -> Tensor:
    """A bias that is small beside what it is added to."""
    return Tensor(f"{name}.bias", (features,), 0.1)


def decoder_layers(text: dict[str, Any]) -> Iterator[Tensor]:
    """The tensors of the decoder's layers."""
    for index in range(text["num_hidden_layers"]):
        yield from decoder_layer(f"model.language_model.layers.{index}", text)


def decoder_layer(layer: str, text: dict[str, Any]) -> Iterator[Tensor]:
    """The tensors of one layer of the decoder."""
    width, inner, heads = text["hidden_size"], text["intermediate_size"], text["num_attention_heads"]
    head_width = text.get("head_dim", width // heads)
    q_width, kv_width = heads * head_width, text["num_key_value_heads"] * head_width
    for norm in ("input", "post_self_attn", "post_attention", "post_mlp"):
        yield scale(f"{layer}.{norm}_layernorm", width)
    for projection, features in (("q", q_width), ("k", kv_width), ("v", kv_width)):
        yield linear(f"{layer}.self_attn.{projection}_proj", features, width)
        if text["attention_bias"]:
            yield bias(f"{layer}.self_attn.{projection}_proj", features)
    yield linear(f"{layer}.self_attn.o_proj", width, q_width)
    yield linear(f"{layer}.mlp.gate_up_proj", 2 * inner, width)
    yield linear(f"{layer}.mlp.down_proj", width, inner)


def vision_tower(vision: dict[str, Any]) -> Iterator[Tensor]:
    """The tensors of the vision transformer, the downsampling and the merger."""
    width, out, side = vision["hidden_size"], vision["out_hidden_size"], vision["image_size"] // vision["patch_size"]
    yield Tensor("model.visual.embeddings.position_embedding.weight", (side * side, width), 1.0)
    yield from patches(vision)
    yield scale("model.visual.post_conv_layernorm", width)
    for index in range(vision["depth"]):
        block = f"model.visual.blocks.{index}"
        yield scale(f"{block}.norm1", width)
        yield scale(f"{block}.norm2", width)
        yield linear(f"{block}.attn.qkv", 3 * width, width)
        yield linear(f"{block}.attn.proj", width, width)
        # The blocks' inner width is the output's, not `intermediate_size`, in the reference.
        yield linear(f"{block}.mlp.gate_proj", out, width)
        yield linear(f"{block}.mlp.up_proj", out, width)
        yield linear(f"{block}.mlp.down_proj", width, out)
    yield from merger(vision, vision["intermediate_size"])


def patches(vision: dict[str, Any]) -> Iterator[Tensor]:
    """The tensors of the patch embedding."""
    frames, patch = vision["temporal_patch_size"], vision["patch_size"]
    name, width = "model.visual.patch_embed.proj", vision["hidden_size"]
    yield linear(name, width, vision["in_channels"], frames, patch, patch)
    yield bias(name, width)


def merger(vision: dict[str, Any], inner: int) -> Iterator[Tensor]:
    """The tensors after the blocks: last norm, downsampling, and the merger that is `inner` wide."""
    width, out, merge = vision["hidden_size"], vision["out_hidden_size"], vision["spatial_merge_size"]
    yield scale("model.visual.post_layernorm", width)
    yield linear("model.visual.downsample", out, width, merge, merge)
    yield bias("model.visual.downsample", out)
    yield linear("model.visual.merger.proj", out, out)
    yield scale("model.visual.merger.post_projection_norm", out)
    yield bias("model.visual.merger.post_projection_norm", out)
    yield linear("model.visual.merger.gate_proj", inner, out)
    yield linear("model.visual.merger.up_proj", inner, out)
    yield linear("model.visual.merger.down_proj", out, inner)


def ends(text: dict[str, Any]) -> Iterator[Tensor]:
    """Embedding, last norm and head. The head's deviation gives logits of deviation 2 from a normed state."""
    vocabulary, width = text["vocab_size"], text["hidden_size"]
    yield Tensor("model.language_model.embed_tokens.weight", (vocabulary, width), 1.0)
    yield scale("model.language_model.norm", width)
    yield Tensor("lm_head.weight", (vocabulary, width), 2 / math.sqrt(width))


def draw(tensor: Tensor) -> np.ndarray:
    """float32 numbers of the wanted shape; a tensor's numbers depend on its name and on no other tensor."""
    raw = np.random.PCG64(zlib.crc32(tensor.name.encode())).random_raw(math.prod(tensor.shape))
    unit = (raw >> np.uint64(11)).astype(np.float64) * 2.0**-52 - 1.0
    values = tensor.centre + tensor.deviation * math.sqrt(3.0) * unit
    return values.astype(np.float32).reshape(tensor.shape)


def printable(tokenizer: Tokenizer) -> np.ndarray:
    """bool [rows of the embedding]: the learned tokens that are plain text by themselves, and so may be written."""
    texts = [tokenizer.decode([index]) for index in range(VOCABULARY.learned)]
    return np.array(
        [text.isascii() and text.isprintable() for text in texts] + [False] * (VOCABULARY.rows - len(texts))
    )


def bfloat16_bytes(values: np.ndarray) -> bytes:
    """Little-endian bfloat16, rounded to nearest and ties to even."""
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype("<u2").tobytes()


def safetensors_bytes(tensors: dict[str, np.ndarray]) -> bytes:
    """A safetensors file: the header's length, the header as JSON, the data; everything in bfloat16."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    chunks: list[bytes] = []
    position = 0
    for name, values in sorted(tensors.items()):
        chunks.append(bfloat16_bytes(values))
        end = position + len(chunks[-1])
        header[name] = {"dtype": "BF16", "shape": list(values.shape), "data_offsets": [position, end]}
        position = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text + b"".join(chunks)


def weight_files(config: dict[str, Any], tokenizer: Tokenizer) -> dict[str, bytes]:
    """The two shards, decoder layers first as in the release, and their index."""
    text, vision = config["text_config"], config["vision_config"]
    return shard_files((decoder_layers(text), (*vision_tower(vision), *ends(text))), tokenizer)


def shard_files(parts: Iterable[Iterable[Tensor]], tokenizer: Tokenizer) -> dict[str, bytes]:
    """A shard of the tensors of each part, and their index."""
    # Tokens that are not plain text get a row of zeros: they stay far below the best of the others.
    muted = ~printable(tokenizer)
    shards = []
    for part in parts:
        shard = {tensor.name: draw(tensor) for tensor in part}
        if "lm_head.weight" in shard:
            shard["lm_head.weight"][muted] = 0
        shards.append(shard)
    names = [f"model-{index + 1:05d}-of-{len(shards):05d}.safetensors" for index in range(len(shards))]
    index = {
        "metadata": {"total_size": sum(2 * values.size for shard in shards for values in shard.values())},
        "weight_map": dict(sorted((key, name) for name, shard in zip(names, shards, strict=True) for key in shard)),
    }
    files = {name: safetensors_bytes(shard) for name, shard in zip(names, shards, strict=True)}
    return {**files, "model.safetensors.index.json": json_bytes(index)}


def checkpoint_files() -> dict[str, bytes]:
    """Every file of the checkpoint: name -> content."""
    tokenizer = train_tokenizer(VOCABULARY)
    config = model_config(VOCABULARY, TEXT, VISION)
    return {**asset_files(VOCABULARY, config, tokenizer), **weight_files(config, tokenizer)}


def main(arguments: list[str]) -> None:
    """Writes the checkpoint to the directory that is named, or to its place among the tests."""
    directory = Path(arguments[0]) if arguments else DEFAULT_DIRECTORY
    files = checkpoint_files()
    write_files(directory, files)
    print(f"{directory}: {len(files)} files, {sum(map(len, files.values())):,} bytes")


if __name__ == "__main__":
    main(sys.argv[1:])
