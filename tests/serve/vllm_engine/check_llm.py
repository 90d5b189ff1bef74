"""The plug-in in vLLM's engine, in this process: `make serve-vllm`.

Not `test_`: it needs an environment of its own, and vLLM in the process changes PyTorch and JAX for all that follows.
"""

import os
import sys

import numpy as np
import pytest
from helpers_vllm_cpu import OPTIONS, environment
from helpers_vllm_prompts import NEW_TOKENS, OTHER_PHOTOGRAPHS, answers, differences, prompts

from glm4v_jax.tiny import TINY_CHECKPOINT


@pytest.fixture(scope="module")
def expected(mesh):
    """Answers of `Engine`: to the prompts, and to those with photographs of other sizes."""
    from glm4v_jax.generate.engine import Engine

    engine = Engine.from_pretrained(TINY_CHECKPOINT)
    return [answers(engine, prompts(*photographs)) for photographs in ((), (OTHER_PHOTOGRAPHS,))]


@pytest.fixture(scope="module")
def llm(tmp_path_factory):
    variables = environment(tmp_path_factory.mktemp("entry"), VLLM_ENABLE_V1_MULTIPROCESSING="0")
    os.environ.update(variables)
    sys.path[:0] = variables["PYTHONPATH"].split(os.pathsep)
    import vllm

    return vllm.LLM(str(TINY_CHECKPOINT), **OPTIONS)


def asked(llm, every):
    """Ids of the prompts and tokens, as `answers` has them."""
    import vllm

    sampling = vllm.SamplingParams(temperature=0, max_tokens=NEW_TOKENS)
    outputs = {}
    for is_video in (False, True):
        chosen = [
            place for place, messages in enumerate(every) if (messages[0]["content"][0]["type"] == "video") == is_video
        ]
        if is_video:
            done = llm.generate([_with_frames(llm, every[place]) for place in chosen], sampling, use_tqdm=False)
        else:
            done = llm.chat([_of_vllm(every[place]) for place in chosen], sampling, use_tqdm=False)
        outputs |= dict(zip(chosen, done, strict=True))
    return [
        (list(outputs[place].prompt_token_ids), list(outputs[place].outputs[0].token_ids)) for place in sorted(outputs)
    ]


def _of_vllm(messages):
    (message,) = messages
    items = [
        {"type": "image_pil", "image_pil": item["image"]} if item["type"] == "image" else item
        for item in message["content"]
    ]
    return [{**message, "content": items}]


def _with_frames(llm, messages):
    """Frames as `LLM.generate` takes them: `LLM.chat` takes files."""
    video = messages[0]["content"][0]
    count, rate = len(video["video"]), video["fps"]
    metadata = dict(fps=rate, total_num_frames=count, duration=count / rate, frames_indices=list(range(count)),
                    video_backend="frames", do_sample_frames=True)  # fmt: skip
    text = llm.get_tokenizer().apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    return {"prompt": text, "multi_modal_data": {"video": [(np.stack(video["video"]), metadata)]}}


EAGER = {"_tokens", "broadcast_in_dim", "concatenate", "dynamic_slice"}
"""Small programs of each number of image tokens: `encode_media` cuts, tpu-inference cuts, puts together and pads."""


def names_in(programs):
    return {name.removeprefix("jit(").removesuffix(")") for name in programs}


def test_prompts_and_greedy_tokens_are_those_of_the_engine(llm, expected, lowerings):
    with lowerings() as programs:
        found = asked(llm, prompts())
    counts, different = differences(found, expected[0])
    assert counts == [15, 15], different
    # tpu-inference traces its selection of tokens, and their logits, once more when they are first used.
    assert names_in(programs) <= EAGER | {
        "_select_from_array_fn",
        "run_compute_logits",
        "convert_element_type",
        "split",
    }


def test_other_sizes_of_the_same_shapes_compile_nothing(llm, expected, lowerings):
    with lowerings() as programs:
        found = asked(llm, prompts(OTHER_PHOTOGRAPHS))
    counts, different = differences(found, expected[1])
    assert counts == [15, 15], different
    assert names_in(programs) <= EAGER


def test_pixels_that_are_not_finite_end_no_engine(llm, expected):
    import vllm

    every = prompts()
    text = llm.get_tokenizer().apply_chat_template(every[1], tokenize=False, add_generation_prompt=True)
    image = np.full((84, 84, 3), np.nan, np.float32)
    invalid = {"prompt": text, "multi_modal_data": {"image": image}}
    (done,) = llm.generate(invalid, vllm.SamplingParams(temperature=0, max_tokens=4), use_tqdm=False)
    assert len(done.outputs[0].token_ids) == 4
    assert asked(llm, every[1:2]) == expected[0][1:2]
