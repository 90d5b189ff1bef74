"""Everything of a tiny checkpoint but its weights: configurations, tokenizer, chat template, as in the release.

Names, spellings and the processors' numbers follow the released GLM-4.1V-9B-Thinking.
"""

import dataclasses
import json
from pathlib import Path
from typing import Any

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from tools import tiny_text

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

SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|"
    r"\s+(?!\S)|\s+"
)


@dataclasses.dataclass(frozen=True)
class Vocabulary:
    """The tokens of a tiny checkpoint.

    Attributes:
      learned: how many the byte-level BPE has; the added ones follow, as 151329.. follow the real tokenizer's.
      rows: of the embedding; as in the released model, there are more of them than tokens.
      text: what the BPE is learned from.
      more_added: tokens after `PLAIN_ADDED_TOKENS` that are added, and not special either.
    """

    learned: int
    rows: int
    text: str
    more_added: tuple[str, ...] = ()

    @property
    def added(self) -> tuple[str, ...]:
        """All added tokens, in the order of their ids."""
        return SPECIAL_TOKENS + PLAIN_ADDED_TOKENS + self.more_added

    def id_of(self, token: str) -> int:
        """The id of an added token."""
        return self.learned + self.added.index(token)

    @property
    def eos_ids(self) -> list[int]:
        """At which generation stops."""
        return [self.id_of(token) for token in ("<|endoftext|>", "<|user|>", "<|assistant|>", "</answer>")]

    @property
    def pad_id(self) -> int:
        """`<|endoftext|>`."""
        return self.id_of("<|endoftext|>")


TEXT = {
    "attention_bias": True,
    "attention_dropout": 0.0,
    "dtype": "bfloat16",
    "hidden_act": "silu",
    "rms_norm_eps": 1e-05,
    "use_cache": True,
}
VISION = {
    "attention_bias": False,
    "attention_dropout": 0.0,
    "hidden_act": "silu",
    "in_channels": 3,
    "patch_size": 14,
    "rms_norm_eps": 1e-05,
    "spatial_merge_size": 2,
    "temporal_patch_size": 2,
}
"""What the configurations of GLM-4.1V and its siblings have in common."""


def model_config(vocabulary: Vocabulary, text: dict[str, Any], vision: dict[str, Any]) -> dict[str, Any]:
    """config.json in the spelling of transformers 4.57.1; `text` and `vision` say what the sizes are."""
    text = {
        **TEXT,
        "eos_token_id": vocabulary.eos_ids,
        "max_position_embeddings": 65536,
        "pad_token_id": vocabulary.pad_id,
        "partial_rotary_factor": 0.5,
        "rope_theta": 10000.0,
        "tie_word_embeddings": False,
        "vocab_size": vocabulary.rows,
        **text,
    }
    vision = VISION | vision
    return {
        "architectures": ["Glm4vForConditionalGeneration"],
        "model_type": "glm4v",
        "image_start_token_id": vocabulary.id_of("<|begin_of_image|>"),
        "image_end_token_id": vocabulary.id_of("<|end_of_image|>"),
        "video_start_token_id": vocabulary.id_of("<|begin_of_video|>"),
        "video_end_token_id": vocabulary.id_of("<|end_of_video|>"),
        "image_token_id": vocabulary.id_of("<|image|>"),
        "video_token_id": vocabulary.id_of("<|video|>"),
        "tie_word_embeddings": False,
        "transformers_version": "4.57.1",
        "text_config": {"model_type": "glm4v_text", **dict(sorted(text.items()))},
        "vision_config": {"model_type": "glm4v", **dict(sorted(vision.items()))},
    }


def generation_config(vocabulary: Vocabulary) -> dict[str, Any]:
    """generation_config.json of the released checkpoint, with this tokenizer's ids."""
    return {
        "_from_model_config": True,
        "do_sample": True,
        "eos_token_id": vocabulary.eos_ids,
        "pad_token_id": vocabulary.pad_id,
        "top_p": 0.6,
        "temperature": 0.8,
        "top_k": 2,
        "transformers_version": "4.57.1",
    }


def processor_config(*, longest_edge: int = 9633792, **more: Any) -> dict[str, Any]:
    """preprocessor_config.json or video_preprocessor_config.json of the released checkpoints."""
    return {
        "size": {"shortest_edge": 12544, "longest_edge": longest_edge},
        "do_rescale": True,
        "patch_size": 14,
        "temporal_patch_size": 2,
        "merge_size": 2,
        "image_mean": [0.48145466, 0.4578275, 0.40821073],
        "image_std": [0.26862954, 0.26130258, 0.27577711],
        **more,
    }


def tokenizer_config(vocabulary: Vocabulary) -> dict[str, Any]:
    """tokenizer_config.json: every added token, the ones that tokenizer.json lacks among them."""
    decoder = {
        str(vocabulary.id_of(token)): {
            "content": token,
            "lstrip": False,
            "normalized": False,
            "rstrip": False,
            "single_word": False,
            "special": token in SPECIAL_TOKENS,
        }
        for token in vocabulary.added
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


def pre_tokenizer() -> pre_tokenizers.Sequence:
    """How GLM-4 splits text before BPE."""
    return pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )


def train_tokenizer(vocabulary: Vocabulary) -> Tokenizer:
    """A byte-level BPE with GLM-4's word splitting, learned from the text, and its first added tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizer()
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary.learned,
        min_frequency=1,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([vocabulary.text], trainer)
    if tokenizer.get_vocab_size() != vocabulary.learned:
        raise RuntimeError(f"the text gives {tokenizer.get_vocab_size()} tokens, expected {vocabulary.learned}")
    # The released tokenizer.json is older than `<|image|>`: from there on, tokens are in tokenizer_config.json alone.
    tokenizer.add_special_tokens(list(vocabulary.added[: vocabulary.added.index("<|image|>")]))
    return tokenizer


def json_bytes(content: object) -> bytes:
    """JSON as the files of the release have it: indented, ASCII or not as it comes, one newline at the end."""
    return (json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode()


def write_files(directory: Path, files: dict[str, bytes]) -> None:
    """Write files by their names into a directory, which is made if need be."""
    directory.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (directory / name).write_bytes(content)


def asset_files(vocabulary: Vocabulary, config: dict[str, Any], tokenizer: Tokenizer) -> dict[str, bytes]:
    """Every file of the checkpoint but its weights: name -> content."""
    owner = "Glm4vProcessor"
    image = processor_config(image_processor_type="Glm4vImageProcessor", processor_class=owner)
    video = processor_config(
        longest_edge=47040000, video_processor_type="Glm4vVideoProcessor", processor_class=owner
    )  # fmt: skip
    return {
        "config.json": json_bytes(config),
        "generation_config.json": json_bytes(generation_config(vocabulary)),
        "preprocessor_config.json": json_bytes(image),
        "video_preprocessor_config.json": json_bytes(video),
        "chat_template.jinja": tiny_text.CHAT_TEMPLATE.encode(),
        "tokenizer.json": json_bytes(json.loads(tokenizer.to_str())),
        "tokenizer_config.json": json_bytes(tokenizer_config(vocabulary)),
    }
