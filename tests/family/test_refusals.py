"""Other models are refused by name, whatever a user tries to do with them."""

import json

import PIL.Image
import pytest

from glm4v_jax.cli import main

# As their files begin; the processors are of other names, or there is none.
OTHERS = {
    "GLM-4.5V or GLM-4.6V, a mixture of experts": {"model_type": "glm4v_moe", "text_config": {"n_routed_experts": 128}},
    "glm-4v-9b": {"model_type": "chatglm", "architectures": ["ChatGLMModel"], "hidden_size": 4096},
    "Qwen2.5-VL": {"model_type": "qwen2_5_vl", "hidden_size": 3584},
}
PROCESSOR = {"image_processor_type": "Qwen2VLImageProcessor", "processor_class": "Qwen2_5_VLProcessor"}


@pytest.mark.parametrize("name", OTHERS)
@pytest.mark.parametrize(
    "command",
    [
        "generate --model {model} Hi", "describe --model {model} {image}", "inspect --model {model} {image}",
        "chat --model {model}", "serve --model {model}", "mesh --model {model} latency:4",
        "convert to-orbax {model} {model}/out", "convert to-hf {model} {model}/out", "convert inspect {model}",
        "convert quantize {model} {model}/out",
    ],
)  # fmt: skip
def test_another_model_is_named_in_one_line(tmp_path, capsys, command, name):
    model, image = tmp_path / "model", tmp_path / "images"
    model.mkdir()
    image.mkdir()
    (model / "config.json").write_text(json.dumps(OTHERS[name]), encoding="utf-8")
    if name == "Qwen2.5-VL":
        (model / "preprocessor_config.json").write_text(json.dumps(PROCESSOR), encoding="utf-8")
    PIL.Image.new("RGB", (56, 56)).save(image / "one.png")
    path = image if command.startswith("describe") else image / "one.png"
    assert main.main(command.format(model=model, image=path).split()) == 1
    (line,) = capsys.readouterr().err.strip().splitlines()
    found = OTHERS[name]["model_type"]
    assert f"config.json: model_type: found {found!r} ({name}" in line and "expected one of 'glm4v'" in line
