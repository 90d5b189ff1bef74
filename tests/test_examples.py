"""The three examples of the reference's page run, and differ from it in lines that name a place or a device only."""

import pathlib
import runpy
import tokenize

import numpy as np
import pytest

from glm4v_jax import Glm4vForConditionalGeneration

EXAMPLES = pathlib.Path(__file__).resolve().parent.parent / "examples"
PAGE = pathlib.Path(__file__).resolve().parent / "golden" / "api_page"
NAMES = ("pipeline_image", "image_chat", "video_chat")

CHECKPOINT = ('"THUDM/GLM-4.1V-9B-Thinking"', "MODEL")
DTYPE = ("torch.bfloat16", "jnp.bfloat16")
ARRAYS = ('return_tensors="pt"', 'return_tensors="np"')
DEVICE = (").to(model.device)", ")")
CAT = '"https://huggingface.co/datasets/huggingface/documentation-images/resolve/main/pipeline-cat-chonk.jpeg"'
BUNNY = '"https://test-videos.co.uk/vids/bigbuckbunny/mp4/h264/720/Big_Buck_Bunny_720_10s_10MB.mp4"'

# All that may differ, besides imports and comments.
CHANGES = {
    "pipeline_image": [
        CHECKPOINT, DTYPE, (CAT, "IMAGE"), ("    device=0,\n", ""),
        # The page shows a session, which echoes what a script has to print.
        ("pipe(text=messages,max_new_tokens=20, return_full_text=False)",
         "print(pipe(text=messages,max_new_tokens=20, return_full_text=False))"),
    ],
    "image_chat": [CHECKPOINT, DTYPE, ARRAYS, DEVICE, (CAT, "IMAGE"), ('    device_map="auto",\n', "")],
    "video_chat": [
        CHECKPOINT, DTYPE, ARRAYS, DEVICE, (BUNNY, "VIDEO"), ("    device_map=device\n", ""),
        ('device = f"{infer_device()}:0"\n', ""),
    ],
}  # fmt: skip
NEW_TOKENS = {"pipeline_image": 20, "image_chat": 128, "video_chat": 1024}
SHORT = 4


def body(text):
    """What is left without comments, imports and blank lines at the start."""
    lines = [line for line in text.splitlines() if not line.startswith(("import ", "from ", "#", '"""'))]
    return "\n".join(lines).strip("\n")


@pytest.mark.parametrize("name", NAMES)
def test_an_example_differs_from_the_page_in_places_and_devices_only(name):
    expected = (PAGE / f"{name}.txt").read_text()
    for old, new in CHANGES[name]:
        assert old in expected
        expected = expected.replace(old, new)
    with tokenize.open(EXAMPLES / f"{name}.py") as file:
        assert body(file.read()) == body(expected)


@pytest.fixture
def short_generations(monkeypatch):
    """Cuts every generation to SHORT new tokens; returns what was asked for, and what came out."""
    calls = []
    generate = Glm4vForConditionalGeneration.generate

    def shortened(self, input_ids, **kwargs):
        asked = kwargs.pop("max_new_tokens")
        ids = generate(self, input_ids, max_new_tokens=SHORT, **kwargs)
        calls.append((asked, np.shape(input_ids), ids))
        return ids

    monkeypatch.setattr(Glm4vForConditionalGeneration, "generate", shortened)
    return calls


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_an_example_runs(name, short_generations, capsys):
    variables = runpy.run_module(f"examples.{name}", run_name="__main__")
    ((asked, prompt_shape, ids),) = short_generations
    assert asked == NEW_TOKENS[name]
    assert ids.shape == (1, prompt_shape[1] + SHORT)
    assert ids.dtype == np.int64
    printed = capsys.readouterr().out
    if name == "pipeline_image":
        (result,) = eval(printed)
        assert result["input_text"] == variables["messages"]
        assert isinstance(result["generated_text"], str)
        return
    inputs, text = variables["inputs"], variables["output_text"]
    assert printed == f"{text}\n"
    kind = "video" if name == "video_chat" else "image"
    values = inputs["pixel_values_videos" if kind == "video" else "pixel_values"]
    grid = inputs[f"{kind}_grid_thw"]
    assert isinstance(values, np.ndarray)
    assert values.shape == (int(grid.prod()), 3 * 2 * 14 * 14)
    assert (inputs["input_ids"] == variables["processor"].image_token_id).sum() == grid.prod() // 4
    if kind == "image":
        assert isinstance(text, list)
        assert len(text) == 1
        assert [len(row) for row in variables["generated_ids_trimmed"]] == [SHORT]
    text = text[0] if kind == "image" else text
    assert text == variables["processor"].decode(ids[0, prompt_shape[1] :], skip_special_tokens=True)
