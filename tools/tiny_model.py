"""What the trained tiny model is: its sizes, its tokens, and the weights with which its training begins."""

from pathlib import Path

from glm4v_jax import Glm4vForConditionalGeneration
from glm4v_jax.config.model import Glm4vConfig
from tools import tiny_text
from tools.tiny_assets import Vocabulary, asset_files, model_config, train_tokenizer, write_files

VOCABULARY = Vocabulary(
    learned=896,
    rows=960,
    text=tiny_text.DIGITS_TEXT,
    more_added=("<|begin_of_box|>", "<|end_of_box|>"),
)

TEXT = {
    "hidden_size": 128,
    "initializer_range": 0.06,
    "intermediate_size": 256,
    "num_attention_heads": 4,
    "num_hidden_layers": 4,
    "num_key_value_heads": 2,
    "rope_scaling": {"rope_type": "default", "mrope_section": [2, 3, 3]},
}
VISION = {
    "depth": 3,
    "hidden_size": 96,
    "image_size": 112,
    "initializer_range": 0.06,
    "intermediate_size": 256,
    "num_heads": 4,
    "out_hidden_size": 128,
}


def write_start(directory: Path, seed: int) -> None:
    """Write the checkpoint that training begins with: random weights in bfloat16, and all that stands beside them."""
    config = model_config(VOCABULARY, TEXT, VISION)
    model = Glm4vForConditionalGeneration(Glm4vConfig.from_dict(config), seed=seed, dtype="bfloat16")
    model.save_pretrained(directory)
    write_files(directory, asset_files(VOCABULARY, config, train_tokenizer(VOCABULARY)))
