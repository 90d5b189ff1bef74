"""Writes random checkpoints of GLM-4.1V's siblings, tiny, each in the file layout of its own release.

    python -m tools.make_family KIND DIRECTORY

A kind is one of `KINDS`: `flash` is GLM-4.6V-Flash, `glmga` is GLM-GA, `ocr` is GLM-OCR. Like that of
`tools/make_random.py`, whose tokenizer, sizes and numbers these have, each is the same to the last byte everywhere.
Names, spellings and values that are not sizes follow the files of the releases, GLM-GA's excepted: those are as
transformers 5.24 writes them. This needs neither JAX nor the package: the environment of transformers 5.24 runs it too.
"""

import dataclasses
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from tools import make_random
from tools.make_random import Tensor, bias, linear, scale
from tools.tiny_assets import json_bytes, processor_config, write_files

TEMPLATE = Path(__file__).parents[1] / "glm4v_jax" / "tiny" / "family_chat_template.jinja"
"""chat_template.jinja of GLM-OCR (MIT license), character for character; its siblings' are of the same family."""

LEARNED = make_random.VOCABULARY.learned

SPECIAL_TOKENS = (
    "<|endoftext|>", "[MASK]", "[gMASK]", "[sMASK]", "<sop>", "<eop>", "<|system|>", "<|user|>", "<|assistant|>",
    "<|observation|>", "<|begin_of_image|>", "<|end_of_image|>", "<|begin_of_video|>", "<|end_of_video|>",
    "<|begin_of_audio|>", "<|end_of_audio|>", "<|begin_of_transcription|>", "<|end_of_transcription|>",
    "<|code_prefix|>", "<|code_middle|>", "<|code_suffix|>",
)  # fmt: skip
PLAIN_TOKENS = (
    "<think>", "</think>", "<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>", "<arg_key>",
    "</arg_key>", "<arg_value>", "</arg_value>", "/nothink", "<|begin_of_box|>", "<|end_of_box|>", "<|image|>",
    "<|video|>",
)  # fmt: skip
ADDED_TOKENS = SPECIAL_TOKENS + PLAIN_TOKENS
"""In the order of the real tokenizers: `<|image|>` is 34 after `<|endoftext|>` (151363 and 59280 are)."""
SPECIAL = {*SPECIAL_TOKENS, "/nothink", "<|image|>", "<|video|>"}


def id_of(token: str) -> int:
    """The id of an added token."""
    return LEARNED + ADDED_TOKENS.index(token)


PAD = id_of("<|endoftext|>")
AGENT_ENDS = [PAD, id_of("<|user|>"), id_of("<|observation|>")]
OCR_ENDS = [PAD, id_of("<|user|>")]


def token_ids() -> dict[str, int]:
    """The ids that config.json has at its top level."""
    tokens = {"image_start": "begin_of_image", "image_end": "end_of_image"}
    tokens |= {"video_start": "begin_of_video", "video_end": "end_of_video", "image": "image", "video": "video"}
    return {f"{name}_token_id": id_of(f"<|{token}|>") for name, token in tokens.items()}


def flash_config() -> dict[str, Any]:
    """config.json of GLM-4.6V-Flash: the classes of GLM-4.1V, in the spelling of transformers 5."""
    text = {
        **{key: value for key, value in make_random.TEXT.items() if key != "rope_scaling"},
        "attention_bias": True,
        "attention_dropout": 0.0,
        "dtype": "bfloat16",
        "eos_token_id": AGENT_ENDS,
        "hidden_act": "silu",
        "max_position_embeddings": 131072,
        "model_type": "glm4v_text",
        "pad_token_id": PAD,
        "rms_norm_eps": 1e-05,
        "rope_parameters": {
            "mrope_section": [1, 1, 2], "partial_rotary_factor": 0.5, "rope_theta": 500000, "rope_type": "default",
        },
        "use_cache": True,
        "vocab_size": make_random.VOCABULARY.rows,
    }  # fmt: skip
    vision = {
        **make_random.VISION,
        "attention_bias": False,
        "attention_dropout": 0.0,
        "hidden_act": "silu",
        "hidden_dropout_prob": 0.0,
        "in_channels": 3,
        "model_type": "glm4v_vision",
        "patch_size": 14,
        "rms_norm_eps": 1e-05,
        "spatial_merge_size": 2,
        "temporal_patch_size": 2,
    }
    return {
        "architectures": ["Glm4vForConditionalGeneration"],
        "model_type": "glm4v",
        "text_config": text,
        "tie_word_embeddings": False,
        "transformers_version": "5.0.0rc0",
        **token_ids(),
        "vision_config": vision,
    }


def glmga_config() -> dict[str, Any]:
    """config.json of GLM-GA: that of Flash under another name, whose class is GLM-4.6V's."""
    names = {"architectures": ["Glm46VForConditionalGeneration"], "model_type": "glmga"}
    return {**flash_config(), **names, "transformers_version": "5.24.0"}


def ocr_config() -> dict[str, Any]:
    """config.json of GLM-OCR: the heads together are wider than the layer, a layer for the token after the next."""
    text = {
        "model_type": "glm_ocr_text",
        "pad_token_id": PAD,
        "vocab_size": make_random.VOCABULARY.rows,
        "eos_token_id": OCR_ENDS,
        "attention_bias": False,
        "attention_dropout": 0.0,
        "head_dim": 16,
        "hidden_act": "silu",
        "hidden_size": 48,
        "initializer_range": 0.02,
        "intermediate_size": 80,
        "max_position_embeddings": 131072,
        "num_attention_heads": 4,
        "num_hidden_layers": 2,
        "num_nextn_predict_layers": 1,
        "num_key_value_heads": 2,
        "rms_norm_eps": 1e-05,
        "dtype": "bfloat16",
        "rope_parameters": {
            "rope_type": "default", "mrope_section": [2, 3, 3], "partial_rotary_factor": 1.0, "rope_theta": 10000,
        },
        "tie_word_embeddings": False,
        "use_cache": True,
    }  # fmt: skip
    vision = {
        "model_type": "glm_ocr_vision",
        "hidden_size": 32,
        "depth": 2,
        "num_heads": 2,
        "attention_bias": True,
        "intermediate_size": 40,
        "hidden_act": "silu",
        "hidden_dropout_prob": 0.0,
        "initializer_range": 0.02,
        "image_size": 336,
        "patch_size": 14,
        "out_hidden_size": 48,
        "rms_norm_eps": 1e-05,
        "spatial_merge_size": 2,
        "temporal_patch_size": 2,
    }
    return {
        "architectures": ["GlmOcrForConditionalGeneration"],
        "model_type": "glm_ocr",
        "text_config": text,
        "vision_config": vision,
        **token_ids(),
        "transformers_version": "5.0.1dev0",
    }


def next_layers(text: dict[str, Any]) -> Iterator[Tensor]:
    """The layers after the decoder's last, which predict the token after the next (MTP).

    In the release their head and embedding are copies of the model's; here they are not, so that mixing them up shows.
    """
    width, rows, first = text["hidden_size"], text["vocab_size"], text["num_hidden_layers"]
    for index in range(first, first + text["num_nextn_predict_layers"]):
        layer = f"model.language_model.layers.{index}"
        yield from make_random.decoder_layer(layer, text)
        for norm in ("enorm", "hnorm", "shared_head.norm"):
            yield scale(f"{layer}.{norm}", width)
        yield linear(f"{layer}.eh_proj", width, 2 * width)
        yield linear(f"{layer}.shared_head.head", rows, width)
        yield Tensor(f"{layer}.embed_tokens.weight", (rows, width), 1.0)


def ocr_vision_tower(vision: dict[str, Any]) -> Iterator[Tensor]:
    """The tensors of GLM-OCR's vision tower: biases, normed queries and keys, neither position table nor first norm."""
    width, inner, channels = vision["hidden_size"], vision["intermediate_size"], 3  # the file leaves them out
    yield from make_random.patches({**vision, "in_channels": channels})
    for index in range(vision["depth"]):
        block = f"model.visual.blocks.{index}"
        for name, features_out, features_in in (
            ("attn.qkv", 3 * width, width), ("attn.proj", width, width),
            ("mlp.gate_proj", inner, width), ("mlp.up_proj", inner, width), ("mlp.down_proj", width, inner),
        ):  # fmt: skip
            yield linear(f"{block}.{name}", features_out, features_in)
            yield bias(f"{block}.{name}", features_out)
        for name, features in (
            ("norm1", width), ("norm2", width),
            ("attn.q_norm", width // vision["num_heads"]), ("attn.k_norm", width // vision["num_heads"]),
        ):  # fmt: skip
            yield scale(f"{block}.{name}", features)
    yield from make_random.merger(vision, vision["out_hidden_size"] * channels)


def ocr_weights(config: dict[str, Any], tokenizer: Tokenizer) -> dict[str, bytes]:
    """All tensors in one file, as in the release."""
    text, vision = config["text_config"], config["vision_config"]
    tensors = (
        *make_random.decoder_layers(text),
        *next_layers(text),
        *ocr_vision_tower(vision),
        *make_random.ends(text),
    )
    files = make_random.shard_files([tensors], tokenizer)
    return {"model.safetensors": files["model-00001-of-00001.safetensors"]}


def flash_processors() -> dict[str, Any]:
    """A file for the images and one for the videos."""
    owner: dict[str, Any] = {"processor_class": "Glm46VProcessor"}
    return {
        "preprocessor_config.json": processor_config(image_processor_type="Glm46VImageProcessor", **owner),
        "video_preprocessor_config.json": processor_config(
            longest_edge=47040000, video_processor_type="Glm46VVideoProcessor", **owner
        ),
    }


def glmga_processors() -> dict[str, Any]:
    """All in one file, as transformers 5 writes it."""
    video = processor_config(
        longest_edge=87478720, video_processor_type="GlmgaVideoProcessor", fps=2, max_frames=640, patch_expand_factor=1,
        do_sample_frames=True,
    )  # fmt: skip
    return {
        "processor_config.json": {
            "image_processor": processor_config(image_processor_type="GlmgaImageProcessor", patch_expand_factor=1),
            "processor_class": "Glm46VProcessor",
            "video_processor": video,
        }
    }


def ocr_processors() -> dict[str, Any]:
    """One file, for the images; videos take the class that belongs to it, and its size."""
    names: dict[str, Any] = {"image_processor_type": "Glm46VImageProcessor", "processor_class": "Glm46VProcessor"}
    return {"preprocessor_config.json": processor_config(**names)}


def tokenizer_files(written_by_5: bool) -> dict[str, Any]:
    """The tokenizer of the other random checkpoint with the family's added tokens."""
    tokenizer = json.loads((make_random.DEFAULT_DIRECTORY / "tokenizer.json").read_text(encoding="utf-8"))
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    added = {id_of(token): {"content": token, **flags, "special": token in SPECIAL} for token in ADDED_TOKENS}
    tokenizer["added_tokens"] = [{"id": index, **token} for index, token in added.items()]
    special = [token for token in ADDED_TOKENS if token in SPECIAL]
    config = {
        "clean_up_tokenization_spaces": False,
        "do_lower_case": False,
        "eos_token": "<|endoftext|>",
        "model_max_length": 131072,
        "pad_token": "<|endoftext|>",
        "padding_side": "left",
        "remove_space": False,
    }
    if written_by_5:
        config |= {"backend": "tokenizers", "extra_special_tokens": special, "tokenizer_class": "TokenizersBackend"}
    else:
        decoder = {str(index): token for index, token in added.items()}
        config |= {"added_tokens_decoder": decoder, "additional_special_tokens": special}
        config |= {"tokenizer_class": "PreTrainedTokenizerFast"}
    return {"tokenizer.json": tokenizer, "tokenizer_config.json": dict(sorted(config.items()))}


@dataclasses.dataclass(frozen=True)
class Kind:
    """What differs between the checkpoints.

    Attributes:
      config: makes config.json.
      processors: makes the files of the processors.
      weights: makes the files of the weights.
      generation: what generation_config.json has beside `pad_token_id`.
      written_by_5: whether transformers 5 wrote the tokenizer's files.
    """

    config: Callable[[], dict[str, Any]]
    processors: Callable[[], dict[str, Any]]
    weights: Callable[[dict[str, Any], Tokenizer], dict[str, bytes]]
    generation: dict[str, Any]
    written_by_5: bool


AGENT_SAMPLING = {"do_sample": True, "eos_token_id": AGENT_ENDS, "top_p": 0.6, "temperature": 0.8, "top_k": 2}
KINDS = {
    "flash": Kind(flash_config, flash_processors, make_random.weight_files, AGENT_SAMPLING, False),
    "glmga": Kind(glmga_config, glmga_processors, make_random.weight_files, AGENT_SAMPLING, True),
    "ocr": Kind(ocr_config, ocr_processors, ocr_weights, {"do_sample": False, "eos_token_id": OCR_ENDS}, True),
}


def checkpoint_files(name: str) -> dict[str, bytes]:
    """Every file of a checkpoint: name -> content."""
    kind = KINDS[name]
    config = kind.config()
    generation = {"_from_model_config": True, "pad_token_id": PAD, **kind.generation}
    contents = {
        "config.json": config,
        "generation_config.json": {**generation, "transformers_version": config["transformers_version"]},
        **kind.processors(),
        **tokenizer_files(kind.written_by_5),
    }
    files = {file: json_bytes(content) for file, content in contents.items()}
    weights = kind.weights(config, Tokenizer.from_str(files["tokenizer.json"].decode()))
    return {**files, "chat_template.jinja": TEMPLATE.read_bytes(), **weights}


def write_checkpoint(name: str, directory: Path) -> None:
    """Write a checkpoint into a directory, which is created if it does not exist."""
    write_files(directory, checkpoint_files(name))


def main(arguments: list[str]) -> None:
    """Writes the checkpoint of the kind to the directory."""
    name, directory = arguments
    write_checkpoint(name, Path(directory))
    print(f"{directory}: {name}, {sum(path.stat().st_size for path in Path(directory).iterdir()):,} bytes")


if __name__ == "__main__":
    main(sys.argv[1:])
