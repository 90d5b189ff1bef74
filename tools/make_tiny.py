"""Writes the tiny checkpoint of the package: GLM-4.1V's shape in Hugging Face layout, with random weights.

    python -m tools.make_tiny [DIRECTORY]

Same bytes every time and on every machine: the numbers come from PCG64's raw bits, which NumPy promises to keep, and
nothing but additions, multiplications and roundings is done to them. File names, tensor names and the two shards follow
the released GLM-4.1V-9B-Thinking; chat template and processor configurations are those of that checkpoint.
"""

import json
import math
import struct
import sys
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from tools import tiny_text

DEFAULT_DIRECTORY = Path(__file__).resolve().parent.parent / "glm4v_jax" / "data" / "tiny"

LEARNED_TOKENS = 768
"""Ids below this are the byte-level BPE's; the special tokens follow, as 151329.. follow the real tokenizer's."""

SPECIAL_TOKENS = (
    "<|endoftext|>",
    "[MASK]",
    "[gMASK]",
    "[sMASK]",
    "<sop>",
    "<eop>",
    "<|system|>",
    "<|user|>",
    "<|assistant|>",
    "<|observation|>",
    "<|begin_of_image|>",
    "<|end_of_image|>",
    "<|begin_of_video|>",
    "<|end_of_video|>",
    "<|image|>",
    "<|video|>",
)
PLAIN_ADDED_TOKENS = ("<think>", "</think>", "<answer>", "</answer>")
"""Added, but not special: they survive `skip_special_tokens`."""

ADDED_TOKENS = SPECIAL_TOKENS + PLAIN_ADDED_TOKENS
TOKENS_IN_TOKENIZER_JSON = ADDED_TOKENS.index("<|image|>")
"""The released tokenizer.json is older than `<|image|>`: from there on, tokens are in tokenizer_config.json alone."""

VOCABULARY = 832
"""Rows of the embedding; as in the released model, there are more of them than tokens."""

SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|"
    r"\s+(?!\S)|\s+"
)


def token_id(token: str) -> int:
    """The id of an added token."""
    return LEARNED_TOKENS + ADDED_TOKENS.index(token)


EOS_IDS = [token_id(token) for token in ("<|endoftext|>", "<|user|>", "<|assistant|>", "</answer>")]
PAD_ID = token_id("<|endoftext|>")


def model_config() -> dict[str, Any]:
    """config.json, in the spelling of transformers 4.57.1."""
    return {
        "architectures": ["Glm4vForConditionalGeneration"],
        "model_type": "glm4v",
        "image_start_token_id": token_id("<|begin_of_image|>"),
        "image_end_token_id": token_id("<|end_of_image|>"),
        "video_start_token_id": token_id("<|begin_of_video|>"),
        "video_end_token_id": token_id("<|end_of_video|>"),
        "image_token_id": token_id("<|image|>"),
        "video_token_id": token_id("<|video|>"),
        "tie_word_embeddings": False,
        "transformers_version": "4.57.1",
        "text_config": {
            "model_type": "glm4v_text",
            "attention_bias": True,
            "attention_dropout": 0.0,
            "dtype": "bfloat16",
            "eos_token_id": EOS_IDS,
            "hidden_act": "silu",
            "hidden_size": 64,
            "initializer_range": 0.02,
            "intermediate_size": 96,
            "max_position_embeddings": 65536,
            "num_attention_heads": 4,
            "num_hidden_layers": 2,
            "num_key_value_heads": 2,
            "pad_token_id": PAD_ID,
            "partial_rotary_factor": 0.5,
            "rms_norm_eps": 1e-05,
            "rope_scaling": {"rope_type": "default", "mrope_section": [1, 1, 2]},
            "rope_theta": 10000.0,
            "tie_word_embeddings": False,
            "use_cache": True,
            "vocab_size": VOCABULARY,
        },
        "vision_config": {
            "model_type": "glm4v",
            "attention_bias": False,
            "attention_dropout": 0.0,
            "depth": 2,
            "hidden_act": "silu",
            "hidden_size": 48,
            "image_size": 336,
            "in_channels": 3,
            "initializer_range": 0.02,
            "intermediate_size": 96,
            "num_heads": 4,
            "out_hidden_size": 64,
            "patch_size": 14,
            "rms_norm_eps": 1e-05,
            "spatial_merge_size": 2,
            "temporal_patch_size": 2,
        },
    }


def generation_config() -> dict[str, Any]:
    """generation_config.json of the released checkpoint, with this tokenizer's ids."""
    return {
        "_from_model_config": True,
        "do_sample": True,
        "eos_token_id": EOS_IDS,
        "pad_token_id": PAD_ID,
        "top_p": 0.6,
        "temperature": 0.8,
        "top_k": 2,
        "transformers_version": "4.57.1",
    }


def processor_config(*, longest_edge: int, **kind: str) -> dict[str, Any]:
    """preprocessor_config.json or video_preprocessor_config.json of the released checkpoint."""
    return {
        "size": {"shortest_edge": 12544, "longest_edge": longest_edge},
        "do_rescale": True,
        "patch_size": 14,
        "temporal_patch_size": 2,
        "merge_size": 2,
        "image_mean": [0.48145466, 0.4578275, 0.40821073],
        "image_std": [0.26862954, 0.26130258, 0.27577711],
        **kind,
        "processor_class": "Glm4vProcessor",
    }


def tokenizer_config() -> dict[str, Any]:
    """tokenizer_config.json: every added token, the ones that tokenizer.json lacks among them."""
    decoder = {
        str(token_id(token)): {
            "content": token,
            "lstrip": False,
            "normalized": False,
            "rstrip": False,
            "single_word": False,
            "special": token in SPECIAL_TOKENS,
        }
        for token in ADDED_TOKENS
    }
    return {
        "added_tokens_decoder": decoder,
        "additional_special_tokens": list(SPECIAL_TOKENS),
        "clean_up_tokenization_spaces": False,
        "do_lower_case": False,
        "eos_token": "<|endoftext|>",
        "extra_special_tokens": {},
        "model_input_names": ["input_ids", "attention_mask"],
        "model_max_length": 65536,
        "pad_token": "<|endoftext|>",
        "padding_side": "left",
        "processor_class": "Glm4vProcessor",
        "remove_space": False,
        "tokenizer_class": "PreTrainedTokenizerFast",
    }


def train_tokenizer() -> Tokenizer:
    """A byte-level BPE with GLM-4's word splitting, learned from the training text, and its first added tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    trainer = trainers.BpeTrainer(
        vocab_size=LEARNED_TOKENS,
        min_frequency=1,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([tiny_text.TRAINING_TEXT], trainer)
    if tokenizer.get_vocab_size() != LEARNED_TOKENS:
        raise RuntimeError(f"the text gives {tokenizer.get_vocab_size()} tokens, expected {LEARNED_TOKENS}")
    tokenizer.add_special_tokens(list(ADDED_TOKENS[:TOKENS_IN_TOKENIZER_JSON]))
    return tokenizer


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
    width, inner, heads = text["hidden_size"], text["intermediate_size"], text["num_attention_heads"]
    kv_width = width // heads * text["num_key_value_heads"]
    for index in range(text["num_hidden_layers"]):
        layer = f"model.language_model.layers.{index}"
        for norm in ("input", "post_self_attn", "post_attention", "post_mlp"):
            yield scale(f"{layer}.{norm}_layernorm", width)
        for projection, features in (("q", width), ("k", kv_width), ("v", kv_width)):
            yield linear(f"{layer}.self_attn.{projection}_proj", features, width)
            yield bias(f"{layer}.self_attn.{projection}_proj", features)
        yield linear(f"{layer}.self_attn.o_proj", width, width)
        yield linear(f"{layer}.mlp.gate_up_proj", 2 * inner, width)
        yield linear(f"{layer}.mlp.down_proj", width, inner)


def vision_tower(vision: dict[str, Any]) -> Iterator[Tensor]:
    """The tensors of the vision transformer, the downsampling and the merger."""
    width, out, inner = vision["hidden_size"], vision["out_hidden_size"], vision["intermediate_size"]
    frames, patch, merge = vision["temporal_patch_size"], vision["patch_size"], vision["spatial_merge_size"]
    side = vision["image_size"] // patch
    yield Tensor("model.visual.embeddings.position_embedding.weight", (side * side, width), 1.0)
    yield linear("model.visual.patch_embed.proj", width, vision["in_channels"], frames, patch, patch)
    yield bias("model.visual.patch_embed.proj", width)
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
    """bool [VOCABULARY]: the learned tokens that are plain text by themselves, and so may be written."""
    texts = [tokenizer.decode([index]) for index in range(LEARNED_TOKENS)]
    return np.array([text.isascii() and text.isprintable() for text in texts] + [False] * (VOCABULARY - len(texts)))


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
    text = config["text_config"]
    # Tokens that are no plain text get a row of zeros: they stay far behind the best of the others.
    muted = ~printable(tokenizer)
    shards = []
    for part in (decoder_layers(text), (*vision_tower(config["vision_config"]), *ends(text))):
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


def json_bytes(content: object) -> bytes:
    """JSON as the files of the release have it: indented, ASCII or not as it comes, one newline at the end."""
    return (json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode()


def checkpoint_files() -> dict[str, bytes]:
    """Every file of the checkpoint: name -> content."""
    config = model_config()
    tokenizer = train_tokenizer()
    return {
        "config.json": json_bytes(config),
        "generation_config.json": json_bytes(generation_config()),
        "preprocessor_config.json": json_bytes(
            processor_config(longest_edge=9633792, image_processor_type="Glm4vImageProcessor")
        ),
        "video_preprocessor_config.json": json_bytes(
            processor_config(longest_edge=47040000, video_processor_type="Glm4vVideoProcessor")
        ),
        "chat_template.jinja": tiny_text.CHAT_TEMPLATE.encode(),
        "tokenizer.json": json_bytes(json.loads(tokenizer.to_str())),
        "tokenizer_config.json": json_bytes(tokenizer_config()),
        **weight_files(config, tokenizer),
    }


def main(arguments: list[str]) -> None:
    """Writes the checkpoint to the directory that is named, or to its place in the package."""
    directory = Path(arguments[0]) if arguments else DEFAULT_DIRECTORY
    directory.mkdir(parents=True, exist_ok=True)
    files = checkpoint_files()
    for name, content in files.items():
        (directory / name).write_bytes(content)
    print(f"{directory}: {len(files)} files, {sum(map(len, files.values())):,} bytes")


if __name__ == "__main__":
    main(sys.argv[1:])
