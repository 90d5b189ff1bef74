"""The random checkpoint of the tests: what the script writes, byte for byte, and a GLM-4.1V to the reference."""

import hashlib
import json
import os
import struct
import subprocess
import sys

import numpy as np
import pytest
from helpers_checkpoints import RANDOM_CHECKPOINT
from helpers_transformers import import_transformers

from tools import make_random

RELEASED_TEMPLATE_SHA256 = "847603d3ed14387a2b45c197f8d07ddee0f9938051549c727cbc894facfea78b"


def read_json(name):
    return json.loads((RANDOM_CHECKPOINT / name).read_text())


def test_the_script_writes_these_bytes():
    files = make_random.checkpoint_files()
    here = {path.name: path.read_bytes() for path in RANDOM_CHECKPOINT.iterdir()}
    assert files.keys() == here.keys()
    assert [name for name in files if files[name] != here[name]] == []


def test_another_process_writes_the_same_bytes(tmp_path):
    root = RANDOM_CHECKPOINT.parents[2]
    environment = {**os.environ, "PYTHONHASHSEED": "1"}
    subprocess.run([sys.executable, "-m", "tools.make_random", tmp_path], cwd=root, env=environment, check=True)
    for path in RANDOM_CHECKPOINT.iterdir():
        assert (tmp_path / path.name).read_bytes() == path.read_bytes(), path.name


def test_it_is_small():
    assert sum(path.stat().st_size for path in RANDOM_CHECKPOINT.iterdir()) < 1_500_000


def test_the_chat_template_is_the_released_one():
    content = (RANDOM_CHECKPOINT / "chat_template.jinja").read_bytes()
    assert hashlib.sha256(content).hexdigest() == RELEASED_TEMPLATE_SHA256


def test_the_index_names_every_tensor_of_every_shard():
    index = read_json("model.safetensors.index.json")
    found, total = {}, 0
    for shard in sorted(set(index["weight_map"].values())):
        content = (RANDOM_CHECKPOINT / shard).read_bytes()
        (length,) = struct.unpack("<Q", content[:8])
        header = json.loads(content[8 : 8 + length])
        assert header.pop("__metadata__") == {"format": "pt"}
        for name, entry in header.items():
            start, end = entry["data_offsets"]
            assert end - start == 2 * int(np.prod(entry["shape"]))
            total += end - start
            found[name] = shard
        assert max(entry["data_offsets"][1] for entry in header.values()) == len(content) - 8 - length
    assert found == index["weight_map"]
    assert len(set(found.values())) == 2
    assert total == index["metadata"]["total_size"]


def test_the_newest_added_tokens_are_in_the_tokenizer_config_alone():
    in_tokenizer = {token["id"]: token["content"] for token in read_json("tokenizer.json")["added_tokens"]}
    in_config = {int(key): entry for key, entry in read_json("tokenizer_config.json")["added_tokens_decoder"].items()}
    first = min(in_config)
    assert list(in_config) == list(range(first, first + 20))
    assert in_tokenizer == {key: in_config[key]["content"] for key in range(first, first + 14)}
    assert [in_config[key]["content"] for key in range(first + 14, first + 20)] == [
        "<|image|>", "<|video|>", "<think>", "</think>", "<answer>", "</answer>",
    ]  # fmt: skip
    assert [key - first for key, entry in in_config.items() if not entry["special"]] == [16, 17, 18, 19]


def test_rounding_to_bfloat16_is_that_of_ml_dtypes():
    ml_dtypes = pytest.importorskip("ml_dtypes")
    values = np.concatenate(
        [
            np.random.default_rng(0).standard_normal(4096).astype(np.float32),
            # Exactly halfway between two bfloat16 numbers, below an even and below an odd one.
            np.array([0x3F808000, 0x3F818000, 0xBF808000, 0xBF818000, 0], np.uint32).view(np.float32),
        ]
    )
    assert make_random.bfloat16_bytes(values) == values.astype(ml_dtypes.bfloat16).tobytes()


def test_drawn_numbers_have_the_declared_moments():
    values = make_random.draw(make_random.Tensor("any", (400, 500), 0.3, 1.5))
    assert values.dtype == np.float32
    assert values.shape == (400, 500)
    assert abs(values.mean() - 1.5) < 0.005
    assert abs(values.std() - 0.3) < 0.003


@pytest.fixture(scope="module")
def reference():
    """(model in float32, what loading reported, tokenizer) of transformers."""
    transformers = import_transformers()
    import torch

    model, report = transformers.Glm4vForConditionalGeneration.from_pretrained(
        RANDOM_CHECKPOINT, dtype=torch.float32, output_loading_info=True
    )
    return model.eval(), report, transformers.AutoTokenizer.from_pretrained(RANDOM_CHECKPOINT)


def test_the_reference_finds_every_tensor_and_no_other(reference):
    _, report, _ = reference
    assert {key: list(value) for key, value in report.items()} == {
        "missing_keys": [], "unexpected_keys": [], "mismatched_keys": [], "error_msgs": [],
    }  # fmt: skip


def test_the_position_table_is_of_order_one(reference):
    table = reference[0].model.visual.embeddings.position_embedding.weight
    assert tuple(table.shape) == (24 * 24, 48)
    assert 0.9 < table.std().item() < 1.1


def test_the_configured_ids_are_the_tokenizers(reference):
    model, _, tokenizer = reference
    config = model.config
    assert {
        "<|begin_of_image|>": config.image_start_token_id,
        "<|end_of_image|>": config.image_end_token_id,
        "<|begin_of_video|>": config.video_start_token_id,
        "<|end_of_video|>": config.video_end_token_id,
        "<|image|>": config.image_token_id,
        "<|video|>": config.video_token_id,
        "<|endoftext|>": config.text_config.pad_token_id,
    } == {token: tokenizer.convert_tokens_to_ids(token) for token in (
        "<|begin_of_image|>", "<|end_of_image|>", "<|begin_of_video|>", "<|end_of_video|>", "<|image|>", "<|video|>",
        "<|endoftext|>",
    )}  # fmt: skip
    eos = ["<|endoftext|>", "<|user|>", "<|assistant|>", "</answer>"]
    assert model.generation_config.eos_token_id == tokenizer.convert_tokens_to_ids(eos)
    assert config.text_config.eos_token_id == model.generation_config.eos_token_id
    assert tokenizer.padding_side == "left"


@pytest.mark.parametrize("text", ["What is in this picture?\n", "Größe: 10 000 m²\t猫\U0001f600 'x'll", ""])
def test_any_text_survives_the_tokenizer(reference, text):
    tokenizer = reference[2]
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


@pytest.mark.parametrize("sampled", [False, True])
def test_the_reference_generates_varied_plain_text(reference, sampled):
    import torch

    model, _, tokenizer = reference
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": "What is in this picture?"}],
        add_generation_prompt=True, return_tensors="pt", return_dict=True,
    )  # fmt: skip
    with torch.no_grad():
        logits = model(**prompt).logits[0, -1]
        torch.manual_seed(0)
        ids = model.generate(**prompt, max_new_tokens=48, do_sample=sampled)
    assert 0.5 < logits[: make_random.VOCABULARY.learned].std().item() < 4
    new_ids = ids[0, prompt["input_ids"].shape[1] :].tolist()
    assert len(new_ids) == 48
    assert len(set(new_ids)) > 16
    text = tokenizer.decode(new_ids)
    assert text.isascii()
    assert text.isprintable()
