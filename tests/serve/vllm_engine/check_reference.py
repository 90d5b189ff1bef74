"""The judge of both: transformers' own model of the environment (5.19), whose processors are vLLM's too."""

import pytest
from helpers_vllm_prompts import NEW_TOKENS, answers, differences, prompts

from glm4v_jax.tiny import TINY_CHECKPOINT


@pytest.fixture(scope="module")
def expected(mesh):
    from glm4v_jax.generate.engine import Engine

    return answers(Engine.from_pretrained(TINY_CHECKPOINT), prompts())


def test_the_engine_answers_as_transformers(expected):
    import numpy as np
    import torch
    import transformers

    model = transformers.Glm4vForConditionalGeneration.from_pretrained(
        TINY_CHECKPOINT, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    processor = transformers.AutoProcessor.from_pretrained(TINY_CHECKPOINT)
    found = []
    for messages in prompts():
        items = messages[0]["content"][:-1]
        text = processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        media = {}
        if images := [item["image"] for item in items if item["type"] == "image"]:
            media["images"] = images
        for item in items:
            if item["type"] == "video":
                count, rate = len(item["video"]), item["fps"]
                media["videos"] = [[np.stack(item["video"])]]
                media["video_metadata"] = [[dict(fps=rate, total_num_frames=count, duration=count / rate,
                                                 frames_indices=list(range(count)))]]  # fmt: skip
        inputs = processor(text=text, return_tensors="pt", **media)
        with torch.no_grad():
            out = model.generate(**inputs, do_sample=False, max_new_tokens=NEW_TOKENS)[0].tolist()
        size = inputs["input_ids"].shape[1]
        found.append((out[:size], out[size:]))
    counts, different = differences(found, expected)
    assert counts == [15, 15], different
