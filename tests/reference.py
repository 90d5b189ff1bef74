"""Tiny models that the reference and this package both read, and what it takes to compare the two.

Weights come from NumPy's frozen generator, tensor by tensor, so that a checkpoint is the same on every machine: the
golden files hold results only, and the tests that read them need neither torch nor transformers.
"""

import json
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from glm4v_jax.checkpoints import hf_mapping
from glm4v_jax.checkpoints.safetensors import write_safetensors
from glm4v_jax.config.model import Glm4vConfig

TOLERANCE = 1e-5
"""Of the largest magnitude: what two float32 programs that add in different orders may differ by.

Measured against the reference in float64, its own float32 results are up to 4e-6 off with these weights, and ours 3e-6.
"""

IDS = dict(
    image_start_token_id=310, image_end_token_id=311, video_start_token_id=312, video_end_token_id=313,
    image_token_id=314, video_token_id=315,
)  # fmt: skip


def _config(text: dict[str, Any], vision: dict[str, Any], ids: dict[str, int] = IDS) -> dict[str, Any]:
    defaults = dict(
        vocab_size=320, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, partial_rotary_factor=0.5, max_position_embeddings=4096, tie_word_embeddings=False,
        rope_scaling={"rope_type": "default", "mrope_section": [1, 1, 2]},
    )  # fmt: skip
    text = {"model_type": "glm4v_text", **defaults, **text}
    vision = {
        "model_type": "glm4v", "depth": 2, "hidden_size": 32, "num_heads": 4, "image_size": 70,
        "out_hidden_size": text["hidden_size"], "intermediate_size": 96, **vision,
    }  # fmt: skip
    return {
        "architectures": ["Glm4vForConditionalGeneration"], "model_type": "glm4v", "tie_word_embeddings": False,
        **ids, "text_config": text, "vision_config": vision,
    }  # fmt: skip


# `config.json` of each model, in the reference's spelling.
CONFIGS: dict[str, dict[str, Any]] = {
    # Two query heads to a key head, a quarter of the frequencies rotated by time and by height, a 5 x 5 position table.
    "base": _config({}, {}),
    # Odd numbers of heads, other activations, a rope that is not the default one, a 7 x 7 table.
    "odd": _config(
        dict(
            hidden_size=48, num_attention_heads=3, num_key_value_heads=1, hidden_act="gelu",
            rope_scaling={"rope_type": "yarn", "factor": 4.0, "mrope_section": [2, 1, 1],
                          "original_max_position_embeddings": 64},
        ),
        dict(hidden_size=24, num_heads=3, image_size=98, hidden_act="gelu_pytorch_tanh", intermediate_size=40),
    ),
    # Three key heads, a fully rotated head, the released 24 x 24 table.
    "wide": _config(
        dict(
            hidden_size=48, num_attention_heads=6, num_key_value_heads=3, partial_rotary_factor=1.0, rope_theta=500.0,
            rope_scaling={"rope_type": "default", "mrope_section": [1, 2, 1]}, hidden_act="gelu_new", rms_norm_eps=1e-4,
        ),
        dict(depth=3, hidden_size=16, num_heads=2, image_size=336, hidden_act="gelu"),
    ),
    # The tester of the reference's own tests: no merging, a tied head, heads of 4 in the ViT.
    "tester": _config(
        dict(
            vocab_size=99, hidden_size=16, intermediate_size=22, num_attention_heads=2, num_key_value_heads=1,
            partial_rotary_factor=1.0, rope_scaling={"type": "default", "mrope_section": [2, 1, 1]},
            tie_word_embeddings=True,
        ),
        dict(hidden_size=48, num_heads=12, image_size=112, spatial_merge_size=1, intermediate_size=22),
        dict(video_start_token_id=3, video_end_token_id=4, image_start_token_id=5, image_end_token_id=6,
             image_token_id=7, video_token_id=8),
    ),
    # Every head with keys of its own, biases in the ViT's attention, patches of one frame.
    "mha": _config(
        dict(num_key_value_heads=4, intermediate_size=40, num_hidden_layers=3),
        dict(depth=1, attention_bias=True, image_size=98, temporal_patch_size=1, patch_size=14),
    ),
}  # fmt: skip


def tensor_names(config: Glm4vConfig) -> dict[str, tuple[int, ...]]:
    """Names, as 4.57.1 writes them, and shapes of a checkpoint's tensors. `load_theirs` checks them."""
    sizes, shapes = hf_mapping.dimensions(config), {}
    for rule in hf_mapping.rules(config):
        depth = config.text_config.num_hidden_layers if "language_model" in rule.tensor else config.vision_config.depth
        for i in range(depth if rule.layered else 1):
            name = rule.tensor.format(i=i)
            shapes[name if name == "lm_head.weight" else f"model.{name}"] = rule.tensor_shape(sizes)
    return shapes


def random_tensors(config: Glm4vConfig, seed: int = 0) -> dict[str, np.ndarray]:
    """Float32 weights that let every part be seen in the output: norms about 1, table and embedding of O(1)."""
    tensors = {}
    for name, shape in tensor_names(config).items():
        x = np.random.RandomState(zlib.crc32(name.encode()) ^ seed).standard_normal(shape)
        if len(shape) == 1:
            x = 0.2 * x + ("norm" in name and name.endswith("weight"))
        elif "embed_tokens" not in name and "position_embedding" not in name:
            x = x * 0.8 / np.sqrt(np.prod(shape[1:]))
        tensors[name] = x.astype(np.float32)
    return tensors


def write_checkpoint(name: str, directory: Path, seed: int = 0) -> None:
    """Write `CONFIGS[name]` and its weights in Hugging Face layout."""
    (directory / "config.json").write_text(json.dumps(CONFIGS[name]), encoding="utf-8")
    config = Glm4vConfig.from_dict(CONFIGS[name])
    write_safetensors(directory / "model.safetensors", random_tensors(config, seed), {"format": "pt"})


def load_theirs(directory: Path) -> Any:
    """The reference's model, which must find every tensor that it wants, and want every tensor that it finds."""
    from helpers_transformers import import_transformers

    transformers = import_transformers()
    model, info = transformers.Glm4vForConditionalGeneration.from_pretrained(
        directory, attn_implementation="eager", dtype="float32", output_loading_info=True
    )
    assert not any(info.values()), info
    return model.eval()


class Prompts:
    """A batch of prompts put together from parts, and the random pixels that go with it.

    A part is a number of random text tokens, ("image", (h, w)) or ("video", (t, h, w)), sides in patches.
    """

    def __init__(self, config: Glm4vConfig, rows: list[list[Any]], *, padding: str = "left", seed: int = 0):
        self.config = config
        self.random = np.random.RandomState(seed)
        grids: dict[str, list[tuple[int, int, int]]] = {"image": [], "video": []}
        made = [[token for part in row for token in self._tokens(part, grids)] for row in rows]
        length = max(map(len, made))
        self.input_ids = np.zeros((len(rows), length), np.int64)
        self.attention_mask = np.zeros((len(rows), length), np.int64)
        for row, (ids, mask) in zip(made, zip(self.input_ids, self.attention_mask, strict=True), strict=True):
            here = slice(length - len(row), length) if padding == "left" else slice(0, len(row))
            ids[here], mask[here] = row, 1
        self.image_grid_thw, self.pixel_values = self._pixels(grids["image"])
        self.video_grid_thw, self.pixel_values_videos = self._pixels(grids["video"])

    def _tokens(self, part: Any, grids: dict[str, list[tuple[int, int, int]]]) -> list[int]:
        config, merge = self.config, self.config.vision_config.spatial_merge_size
        if isinstance(part, int):
            return self.text(part)
        kind, grid = part
        grids[kind].append((1, *grid) if kind == "image" else grid)
        frame = [config.image_token_id] * (grid[-2] * grid[-1] // merge**2)
        frame = [config.image_start_token_id, *frame, config.image_end_token_id]
        if kind == "image":
            return frame
        # As the processor writes it: every frame is followed by its time.
        frames = [token for _ in range(grid[0]) for token in (*frame, *self.text(1))]
        return [config.video_start_token_id, *frames, config.video_end_token_id]

    def text(self, n: int) -> list[int]:
        """Random tokens that mark nothing."""
        marks = {value for key, value in IDS.items()} if self.config.image_token_id == 314 else set(range(3, 9))
        words = [i for i in range(self.config.text_config.vocab_size) if i not in marks]
        return self.random.choice(words, n).tolist()

    def _pixels(self, grids: list[tuple[int, int, int]]) -> tuple[np.ndarray | None, np.ndarray | None]:
        if not grids:
            return None, None
        grid_thw = np.array(grids, np.int64)
        patches = int(grid_thw.prod(axis=1).sum())
        pixels = self.random.standard_normal((patches, self.config.vision_config.patch_dim))
        return grid_thw, pixels.astype(np.float32)

    @property
    def inputs(self) -> dict[str, np.ndarray]:
        """What a processor would return."""
        names = (
            "input_ids", "attention_mask", "pixel_values", "image_grid_thw", "pixel_values_videos", "video_grid_thw",
        )  # fmt: skip
        return {name: getattr(self, name) for name in names if getattr(self, name) is not None}

    @property
    def real(self) -> np.ndarray:
        """bool [B, T]: where there is no padding."""
        return self.attention_mask == 1


def to_torch(inputs: dict[str, np.ndarray]) -> dict[str, Any]:
    """The same inputs as torch tensors."""
    import torch

    return {name: torch.tensor(value) for name, value in inputs.items()}


def their_inputs(model: Any, prompts: Prompts) -> dict[str, Any]:
    """Inputs for the reference, which refuses pictures beside videos: it is then given what it makes of them itself.

    Features are its ViT's, positions its `get_rope_index`'s (which does mix them), and each vision token takes the next
    feature of its own kind, as transformers 5 assigns them by `mm_token_type_ids`.
    """
    import torch

    inputs = to_torch(prompts.inputs)
    if prompts.pixel_values is None or prompts.pixel_values_videos is None:
        return inputs
    config, core = prompts.config, model.model
    with torch.no_grad():
        queues = {
            False: iter(torch.cat(core.get_image_features(inputs["pixel_values"], inputs["image_grid_thw"]))),
            True: iter(torch.cat(core.get_video_features(inputs["pixel_values_videos"], inputs["video_grid_thw"]))),
        }
        embeds = core.get_input_embeddings()(inputs["input_ids"])
        for b, t in zip(*np.nonzero(prompts.input_ids == config.image_token_id), strict=True):
            before = prompts.input_ids[b, :t]
            started = (before == config.video_start_token_id).sum() > (before == config.video_end_token_id).sum()
            embeds[b, t] = next(queues[bool(started)])
    assert all(next(queue, None) is None for queue in queues.values())
    mask = inputs["attention_mask"]
    positions, _ = core.get_rope_index(inputs["input_ids"], inputs["image_grid_thw"], inputs["video_grid_thw"], mask)
    return {"inputs_embeds": embeds, "attention_mask": mask, "position_ids": positions}


def assert_close(found: Any, expected: Any, where: np.ndarray | None = None, *, tolerance: float = TOLERANCE) -> None:
    """Equal up to `tolerance` of the largest expected magnitude, at the first dimensions that `where` picks."""
    found, expected = (
        np.asarray(found),
        expected.detach().numpy() if hasattr(expected, "detach") else np.asarray(expected),
    )
    assert found.shape == expected.shape
    if where is not None:
        found, expected = found[where], expected[where]
    scale = np.abs(expected).max()
    assert np.isfinite(scale) and scale > 0
    worst = np.abs(found.astype(np.float64) - expected).max() / scale
    assert worst <= tolerance, f"differs by {worst:.3g} of the largest magnitude, {scale:.3g}"


def assert_gradients_equal(gradients: Mapping[str, Any], model: Any) -> None:
    """Each parameter's gradient is that of the reference, which is then cleared: norms and numbers to 1e-4.

    Where the reference has none, as of a ViT that was not run, it is 0.
    """
    for name, parameter in model.named_parameters():
        if parameter.grad is None:
            assert not np.any(gradients[name]), name
            continue
        norm = float(parameter.grad.norm())
        assert abs(np.linalg.norm(gradients[name]) - norm) <= 1e-4 * norm, name
        assert_close(gradients[name], parameter.grad, tolerance=1e-4)
    model.zero_grad(set_to_none=True)


def export(module: Any, config: Glm4vConfig) -> dict[str, np.ndarray]:
    """A tree like our model (its weights, or their gradients) as tensors by the checkpoint's names."""
    import jax

    from glm4v_jax.model.params import leaf_paths

    leaves = dict(zip(leaf_paths(module), map(np.asarray, jax.tree.leaves(module)), strict=True))
    sizes, tensors = hf_mapping.dimensions(config), {}
    for name, (rule, layer) in hf_mapping.tensor_rules(config).items():
        path = rule.leaf
        if layer is not None:
            group, rest = next((g, path.removeprefix(g)) for g in _GROUPS if path.startswith(g))
            stacked = f"{group}stacked.{rest}"
            leaf = leaves[stacked][layer] if stacked in leaves else leaves[f"{group}{layer}.{rest}"]
        else:
            leaf = leaves[path]
        tensors[name] = rule.to_tensor(leaf[rule.index], sizes)
    return tensors


_GROUPS = ("language_model.layers.", "visual.blocks.")


def their_modeling() -> Any:
    """The reference's module of sub-layers; skips the test where there is none."""
    import importlib

    from helpers_transformers import import_transformers

    import_transformers()
    return importlib.import_module("transformers.models.glm4v.modeling_glm4v")
