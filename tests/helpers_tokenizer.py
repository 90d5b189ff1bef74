"""Small tokenizers and processor directories in the layout of the released checkpoint, written for tests."""

import json
import pathlib
import shutil
from collections.abc import Sequence

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from glm4v_jax import tiny
from tools.tiny_assets import SPECIAL_TOKENS, Vocabulary, pre_tokenizer, tokenizer_config

GOLDEN = pathlib.Path(__file__).parent / "golden"
# GLM-OCR's; that of GLM-4.6V-Flash is of the same family: tools, thoughts, and a switch that turns these off.
FAMILY_TEMPLATE = tiny.FAMILY_TEMPLATE.read_text()

# The released tokenizer.json ends with <|end_of_video|>; the rest is in tokenizer_config.json alone.
IN_TOKENIZER_JSON = 14


def write_small_tokenizer(directory: pathlib.Path, merges: Sequence[tuple[str, str]] = ()) -> pathlib.Path:
    """Write `tokenizer.json` and `tokenizer_config.json` of a byte-level GLM-like tokenizer.

    Ids: the 256 bytes in the order of the byte alphabet, then one id for each of `merges`, then `SPECIAL_TOKENS` and
    `PLAIN_ADDED_TOKENS`. Without merges `<|endoftext|>` is 256, `<|image|>` 270, `<|video|>` 271, `</answer>` 275, and
    the tokenizer is the one of `golden/facts/processor_expansion_4.57.1.json`.
    """
    directory.mkdir(parents=True, exist_ok=True)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: index for index, token in enumerate([*alphabet, *(left + right for left, right in merges)])}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=list(merges)))
    tokenizer.pre_tokenizer = pre_tokenizer()
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(
        [AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS[:IN_TOKENIZER_JSON]]
    )
    tokenizer.save(str(directory / "tokenizer.json"))
    config = tokenizer_config(Vocabulary(learned=len(vocab), rows=0, text=""))
    (directory / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    return directory


def write_small_processor(directory: pathlib.Path) -> pathlib.Path:
    """Write the small tokenizer and the released checkpoint's processor files: all that `Glm4vProcessor` reads."""
    write_small_tokenizer(directory)
    for path in (GOLDEN / "checkpoint").iterdir():
        shutil.copy(path, directory)
    return directory
