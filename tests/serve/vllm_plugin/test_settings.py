"""What of vLLM's options is taken, and what is refused before anything is read."""

from types import SimpleNamespace

import pytest
from helpers_vllm import vllm_config

from glm4v_jax.config.model import Glm4vConfig
from glm4v_jax.errors import ConfigError
from glm4v_jax.serve.vllm_plugin.settings import VllmSettings, check_heads, check_same_model, refuse


def mesh(**axes):
    return SimpleNamespace(shape={"data": 1, "model": 1} | axes)


REFUSED = {
    "--pipeline-parallel-size: found 2": dict(pipeline_parallel_size=2),
    "--enable-lora": dict(lora_config=object()),
    "--speculative-config": dict(speculative_config=object()),
    "--load-format: found 'dummy'": dict(load_format="dummy"),
    "--kv-cache-dtype: found 'fp8'": dict(cache_dtype="fp8"),
    "--runner: found 'pooling'": dict(runner_type="pooling"),
    "--additional-config: quantization": dict(additional_config={"quantization": {}}),
    "--limit-mm-per-prompt video: found 2": dict(limit_per_prompt={"video": SimpleNamespace(count=2)}),
    "--enable-mm-embeds": dict(enable_mm_embeds=True),
    "--video-pruning-rate: found 0.5": dict(video_pruning_rate=0.5),
}


@pytest.mark.parametrize("message", REFUSED)
def test_what_is_not_built_is_refused(message):
    with pytest.raises(ConfigError) as error:
        refuse(vllm_config("", **REFUSED[message]), mesh())
    assert str(error.value).startswith(message) and "expected" in str(error.value)


def test_all_that_is_refused_is_named_at_once():
    with pytest.raises(ConfigError) as error:
        refuse(vllm_config("", pipeline_parallel_size=2, lora_config=object()), mesh(data=4))
    assert [fault.partition(":")[0] for fault in error.value.faults] == [
        "--pipeline-parallel-size", "--enable-lora", "mesh",
    ]  # fmt: skip


def test_what_is_built_is_accepted():
    limits = {"image": SimpleNamespace(count=8), "video": SimpleNamespace(count=1)}
    refuse(vllm_config("", limit_per_prompt=limits, additional_config={"max_decode_steps": 4}), mesh(model=2))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"glm4v_quantise": "int8"}, "glm4v_quantise: found an unknown field"),
        ({"glm4v_quantize": "int3"}, "glm4v_quantize: found 'int3'"),
        ({"glm4v_checkpoint": 3}, "glm4v_checkpoint: found 3"),
    ],
)
def test_keys_of_this_package_are_checked(given, message):
    with pytest.raises(ConfigError, match="--additional-config: ") as error:
        VllmSettings.read({"max_decode_steps": 4} | given)
    assert message in str(error.value)


@pytest.mark.parametrize("given", [None, {}, {"max_decode_steps": 4}])
def test_other_keys_are_left_to_others(given):
    assert VllmSettings.read(given) == VllmSettings()


def test_key_heads_divide_by_the_devices():
    check_heads(Glm4vConfig.glm4_1v_9b(), mesh(model=2))
    with pytest.raises(ConfigError, match="--tensor-parallel-size: found 4; expected a divisor of 2"):
        check_heads(Glm4vConfig.glm4_1v_9b(), mesh(model=4))


def test_weights_are_of_the_model_that_vllm_has_planned_for():
    config = Glm4vConfig.tiny()
    check_same_model(config, config, "orbax")
    with pytest.raises(ConfigError, match="orbax: num_hidden_layers: found 2; expected 40, as --model has it"):
        check_same_model(config, Glm4vConfig.glm4_1v_9b(), "orbax")
