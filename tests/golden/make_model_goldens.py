"""Makes `model/*.npz`: what transformers 4.57.1 computes from the tiny checkpoints of `tests/reference.py`.

    PYTHONPATH=tests python -m tests.golden.make_model_goldens

Weights, tokens and pixels come from frozen generators, so that only results are kept: logits at every third real token,
every second vision feature, M-RoPE positions, and, of the first configuration, the tokens of greedy decoding.
"""

import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from reference import CONFIGS, Prompts, load_theirs, their_inputs, write_checkpoint

from glm4v_jax.config.model import Glm4vConfig

HERE = Path(__file__).parent / "model"
CASES: dict[str, dict[str, Any]] = {
    "text": dict(rows=[[13], [21]], padding="left", seed=1),
    "picture": dict(rows=[[3, ("image", (4, 10)), 5]], padding="left", seed=2),
    "pictures": dict(rows=[[3, ("image", (4, 6)), 2, ("image", (8, 2)), ("image", (2, 2)), 5]], padding="left", seed=3),
    "video": dict(rows=[[3, ("video", (3, 4, 4)), 4]], padding="left", seed=4),
    "mixed": dict(
        rows=[[3, ("image", (4, 6)), 2, ("video", (2, 4, 2)), 1, ("image", (2, 2)), 3]], padding="left", seed=5
    ),
    "long": dict(rows=[[260, ("image", (4, 6)), 270]], padding="left", seed=6),
}
PLAN = [*(("base", case) for case in CASES), ("tester", "pictures"), ("odd", "long")]
NEW = 24


def results(model: Any, prompts: Prompts, every: int, generate: bool) -> dict[str, np.ndarray]:
    inputs = their_inputs(model, prompts)
    raw = {k: torch.tensor(v) for k, v in prompts.inputs.items()}
    positions, deltas = model.model.get_rope_index(
        raw["input_ids"], raw.get("image_grid_thw"), raw.get("video_grid_thw"), raw["attention_mask"]
    )
    with torch.no_grad():
        made = {
            "input_ids": prompts.input_ids.astype(np.int16),
            "position_ids": positions.numpy().astype(np.int16),
            "rope_deltas": deltas.numpy().astype(np.int16),
            "logits": model(**inputs).logits.numpy()[prompts.real][::every],
        }
        features = []
        if prompts.pixel_values is not None:
            features += model.model.get_image_features(raw["pixel_values"], raw["image_grid_thw"])
        if prompts.pixel_values_videos is not None:
            features += model.model.get_video_features(raw["pixel_values_videos"], raw["video_grid_thw"])
        if features:
            made["features"] = torch.cat(features).numpy()[::2]
    if generate:
        made["tokens"] = greedy(model, prompts).astype(np.int16)
    return made


def greedy(model: Any, prompts: Prompts) -> np.ndarray:
    """[B, NEW]; pictures beside videos go token by token, every time from the start."""
    if prompts.pixel_values is None or prompts.pixel_values_videos is None:
        inputs = {k: torch.tensor(v) for k, v in prompts.inputs.items()}
        model.model.rope_deltas = None
        with torch.no_grad():
            out = model.generate(**inputs, max_new_tokens=NEW, do_sample=False, eos_token_id=None, pad_token_id=0)
        return out.numpy()[:, -NEW:]
    tokens = []
    for _ in range(NEW):
        with torch.no_grad():
            tokens.append(int(model(**their_inputs(model, prompts)).logits[0, -1].argmax()))
        prompts.input_ids = np.append(prompts.input_ids, [[tokens[-1]]], axis=1)
        prompts.attention_mask = np.ones_like(prompts.input_ids)
    return np.array([tokens])


def main() -> None:
    HERE.mkdir(exist_ok=True)
    (HERE / "cases.json").write_text(json.dumps(CASES, indent=1) + "\n", encoding="utf-8")
    models: dict[str, Any] = {}
    for name, case in PLAN:
        if name not in models:
            with tempfile.TemporaryDirectory() as directory:
                write_checkpoint(name, Path(directory))
                models[name] = load_theirs(Path(directory))
        prompts = Prompts(Glm4vConfig.from_dict(CONFIGS[name]), **CASES[case])
        made = results(models[name], prompts, every=30 if case == "long" else 3, generate=name == "base")
        np.savez_compressed(HERE / f"{name}-{case}.npz", **made)


if __name__ == "__main__":
    main()
