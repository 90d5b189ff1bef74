"""Makes `family/*`: what transformers 5.24 computes from the tiny checkpoints of `tools/make_family.py`.

    make family-goldens

It runs in an environment of its own (.venv-5x), which has neither JAX nor this package. Weights, prompts and pixels
come from frozen generators (`tests/helpers_family.py`), so that only results are kept, and of the large ones samples.
"""

import json
import tempfile
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
from helpers_family import CASES, CHATS, GOLDEN, KINDS, NEW, chat_of, checkpoint, digest, pixel_digest
from helpers_transformers import define_torchvision_operators

define_torchvision_operators()

import transformers  # noqa: E402
from transformers import AutoImageProcessor, AutoModelForImageTextToText, AutoProcessor  # noqa: E402
from transformers.video_utils import VideoMetadata  # noqa: E402

VIDEOS = (
    (12, 30, 0.4), (24, 30, 0.8), (60, 30, 2), (32, 8, 4), (300, 30, 10), (899, 29.97, None), (900, 30, 30),
    (930, 30, 31), (1440, 24, 60), (3600, 30, 120), (9000, 30, 300), (9030, 30, 301), (18000, 30, 600),
    (60000, 25, 2400), (90000, 25, 3600), (7, 1, 7), (5, 2, 2.5), (100, 10, None), (1, 1, 1), (3, 30, 0.1),
)  # fmt: skip
"""Frames, frames per second, seconds: what the samplers choose from."""


def load_processor(directory: Path) -> Any:
    """The processor that the files name, but with Pillow for its images: torchvision resizes a little differently."""
    processor = AutoProcessor.from_pretrained(directory)
    processor.image_processor = AutoImageProcessor.from_pretrained(directory, backend="pil")
    return processor


def prepare(processor: Any, kind: str, case: dict[str, Any]) -> Any:
    """What the processor makes of a case."""
    prompt = processor.apply_chat_template(tokenize=False, add_generation_prompt=True, **chat_of(kind, case))
    metadata = [VideoMetadata(**fields) for fields in case.get("metadata", [])]
    return processor(
        text=[prompt], images=case.get("images"), videos=case.get("videos"), return_tensors="pt",
        **({"video_metadata": metadata, "return_metadata": True} if metadata else {}),
    )  # fmt: skip


def results(model: Any, inputs: Any) -> dict[str, np.ndarray]:
    """Ids, positions, logits and greedy tokens of a prompt, and samples of its pixels."""
    core, ids = model.model, inputs["input_ids"]
    grids = {name: inputs.get(name) for name in ("image_grid_thw", "video_grid_thw")}
    positions, deltas = core.get_rope_index(ids, inputs["mm_token_type_ids"], **grids)
    made = {
        "input_ids": ids[0].numpy().astype(np.int16),
        "position_ids": positions[:, 0].numpy().astype(np.int16),
        "rope_deltas": deltas.numpy().astype(np.int16),
        **{name: grid.numpy().astype(np.int16) for name, grid in grids.items() if grid is not None},
    }
    for name in ("pixel_values", "pixel_values_videos"):
        if name in inputs:
            pixels = inputs[name].numpy()
            made[f"{name}.sample"] = pixels[:: max(1, len(pixels) // 5), ::147]
            made[f"{name}.sha256"] = np.frombuffer(pixel_digest(pixels), np.uint8)
    if "video_metadata" in inputs:
        made["frames"] = np.array(inputs.pop("video_metadata")[0].frames_indices, np.int16)
    logits, tokens = greedy(model, inputs)
    rows = np.linspace(0, len(logits) - 1, 12).astype(int)
    return {**made, "rows": rows.astype(np.int16), "logits": logits[rows, ::13], "tokens": tokens.astype(np.int16)}


@torch.no_grad()
def greedy(model: Any, inputs: Any) -> tuple[np.ndarray, np.ndarray]:
    """The logits of the prompt, and `NEW` tokens."""
    core, ids = model.model, inputs["input_ids"]
    if "pixel_values" not in inputs or "pixel_values_videos" not in inputs:
        out = model.generate(
            **inputs, max_new_tokens=NEW, do_sample=False, temperature=None, top_p=None, top_k=None, eos_token_id=None
        )
        core.rope_deltas = None
        return model(**inputs).logits[0].numpy(), out[0, ids.shape[1] :].numpy()
    # Refused together, so given as what it makes of them itself: features of its ViT, positions of its own.
    types, embeds = inputs["mm_token_type_ids"], core.get_input_embeddings()(ids)
    grids = {name: inputs[name] for name in ("image_grid_thw", "video_grid_thw")}
    images = core.get_image_features(inputs["pixel_values"], grids["image_grid_thw"]).pooler_output
    videos = core.get_video_features(inputs["pixel_values_videos"], grids["video_grid_thw"]).pooler_output
    embeds[types == 1], embeds[types == 2] = torch.cat(images), torch.cat(videos)
    positions, deltas = core.get_rope_index(ids, types, **grids)
    prompt, tokens = None, []
    for step in range(NEW):
        logits = model(inputs_embeds=embeds, position_ids=positions).logits[0]
        prompt = logits if prompt is None else prompt
        tokens.append(logits[-1].argmax())
        embeds = torch.cat([embeds, core.get_input_embeddings()(tokens[-1])[None, None]], dim=1)
        positions = torch.cat([positions, (deltas + ids.shape[1] + step).expand(3, 1, 1)], dim=2)
    return prompt.numpy(), torch.stack(tokens).numpy()


def samples() -> list[dict[str, Any]]:
    """What both samplers choose; of the shortest clips GLM-GA's chooses nothing."""
    processors = {"glm46v": transformers.Glm46VVideoProcessor(), "glmga": transformers.GlmgaVideoProcessor()}
    rows = []
    for total, fps, duration in VIDEOS:
        known = VideoMetadata(total_num_frames=total, fps=fps, duration=duration)
        chosen = {name: processor.sample_frames(known).tolist() for name, processor in processors.items()}
        rows.append({"total_num_frames": total, "fps": fps, "duration": duration, **chosen})
    return rows


def renders(processor: Any) -> dict[str, str]:
    """The family's template applied to the conversations."""
    rendered = {}
    for name, chat in CHATS.items():
        arguments = {"add_generation_prompt": True, **chat}
        messages = arguments.pop("messages")
        rendered[name] = processor.apply_chat_template(messages, tokenize=False, **arguments)
    return rendered


def saved_files(model: Any, processor: Any, directory: Path) -> dict[str, Any]:
    """The configurations as 5.24 writes them, where these are not the release's."""
    model.config.save_pretrained(directory)
    processor.save_pretrained(directory)
    names = ("config.json", "processor_config.json", "tokenizer_config.json")
    return {name: json.loads((directory / name).read_text(encoding="utf-8")) for name in names}


def dumped(value: Any) -> str:
    """JSON without spaces."""
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"))


def write_lines(name: str, rows: list[str], brackets: str) -> None:
    """A line for each entry, so that changes can be read."""
    content = f"{brackets[0]}\n" + ",\n".join(rows) + f"\n{brackets[1]}\n"
    (GOLDEN / name).write_text(content, encoding="utf-8")


def main() -> None:
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    GOLDEN.mkdir(exist_ok=True)
    write_lines("sample_frames_5.24.json", [dumped(row) for row in samples()], "[]")
    files = {}
    for kind in KINDS:
        with tempfile.TemporaryDirectory() as directory:
            path = checkpoint(kind, Path(directory))
            processor = load_processor(path)
            model = AutoModelForImageTextToText.from_pretrained(path, attn_implementation="eager", dtype="float32")
            files[kind] = saved_files(model, AutoProcessor.from_pretrained(path), Path(directory) / "saved")
            arrays = {"checkpoint": np.array(digest(path))}
        for name, case in CASES.items():
            for key, value in results(model.eval(), prepare(processor, kind, case)).items():
                arrays[f"{name}/{key}"] = value
        np.savez_compressed(GOLDEN / f"{kind}.npz", **arrays)
        if kind == "flash":
            write_lines(
                "chat_renders.json", [f"{dumped(key)}: {dumped(x)}" for key, x in renders(processor).items()], "{}"
            )
    write_lines("saved_files.json", [f"{dumped(kind)}: {dumped(saved)}" for kind, saved in files.items()], "{}")


if __name__ == "__main__":
    main()
