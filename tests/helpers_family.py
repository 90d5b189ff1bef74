"""The siblings of GLM-4.1V: tiny checkpoints, and what is asked of them here and of transformers 5.24.

Imported by `tests/golden/make_family_goldens.py` in an environment without JAX and pytest: so this needs NumPy alone.
"""

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
from helpers_checkpoints import RANDOM_CHECKPOINT

from tools import make_family

GOLDEN = Path(__file__).parent / "golden" / "family"
KINDS = ("glm4v", *make_family.KINDS)
NEW = 64
"""Tokens of greedy decoding."""


def checkpoint(kind: str, directory: Path) -> Path:
    """A checkpoint of the kind, written below `directory` unless it is the committed one."""
    if kind == "glm4v":
        return RANDOM_CHECKPOINT
    if not (directory / kind).exists():
        make_family.write_checkpoint(kind, directory / kind)
    return directory / kind


def digest(directory: Path) -> str:
    """A hash of the files of a checkpoint: the goldens are of these."""
    found = hashlib.sha256()
    for path in sorted(directory.iterdir()):
        found.update(path.name.encode() + hashlib.sha256(path.read_bytes()).digest())
    return found.hexdigest()


def pixel_digest(pixels: np.ndarray) -> bytes:
    """Of pixels that are normalised, the hash of the eight bits that they were."""
    mean = np.array([0.48145466, 0.4578275, 0.40821073])[:, None]
    deviation = np.array([0.26862954, 0.26130258, 0.27577711])[:, None]
    bits = (pixels.reshape(len(pixels), 3, -1).astype(np.float64) * deviation + mean) * 255
    return hashlib.sha256(np.rint(bits).astype(np.uint8).tobytes()).digest()


def picture(height: int, width: int, seed: int) -> np.ndarray:
    """uint8 [height, width, 3]: a slope with noise, the same everywhere."""
    noise = np.random.PCG64(seed).random_raw(height * width * 3).reshape(height, width, 3) % 64
    slope = np.arange(height)[:, None] + 2 * np.arange(width)[None, :] + 40 * seed
    return ((slope[..., None] + noise.astype(np.int64)) % 256).astype(np.uint8)


def video(frames: int, height: int, width: int, seed: int) -> np.ndarray:
    """uint8 [frames, height, width, 3]."""
    return np.stack([picture(height, width, seed + index) for index in range(frames)])


SEARCH = {
    "type": "function",
    "function": {
        "name": "search",
        "description": "Suche im Netz: „größte“ <b>&</b> kleinste",
        "parameters": {"type": "object", "properties": {"query": {"type": "string"}, "limit": {"type": "integer"}}},
    },
}
CROP = {"type": "function", "function": {"name": "crop", "parameters": {"type": "object", "properties": {}}}}

IMAGE, VIDEO = {"type": "image"}, {"type": "video"}


def text(value: str) -> dict[str, str]:
    return {"type": "text", "text": value}


def user(*items: dict[str, Any] | str) -> dict[str, Any]:
    if len(items) == 1 and isinstance(items[0], str):
        return {"role": "user", "content": items[0]}
    return {"role": "user", "content": [text(item) if isinstance(item, str) else item for item in items]}


def call(name: str, **arguments: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, "arguments": arguments}}


# Only the one image must be resized: for it Pillow does that here as there, while videos are torchvision's there.
CASES: dict[str, dict[str, Any]] = {
    "text": {
        "messages": [{"role": "system", "content": "Be brief."}, user("What is a picture?")],
        "enable_thinking": False,
    },
    "image": {"messages": [user(IMAGE, "What is in this picture?")], "images": [picture(100, 150, 1)]},
    "images": {
        "messages": [user(IMAGE, "And", IMAGE, "Which is brighter?")],
        "images": [picture(112, 140, 2), picture(84, 196, 3)],
    },
    "video": {
        "messages": [user(VIDEO, "Describe this video.")],
        "videos": [video(60, 56, 84, 4)],
        "metadata": [{"total_num_frames": 60, "fps": 30, "duration": 2}],
    },
    "everything": {
        "messages": [
            user(IMAGE, "Find more like this."),
            {"role": "assistant", "content": "I search.", "tool_calls": [call("search", query="cat", limit=2)]},
            {"role": "tool", "content": [text("One:"), VIDEO]},
        ],
        "tools": [SEARCH],
        "images": [picture(112, 112, 5)],
        "videos": [video(30, 84, 56, 6)],
        "metadata": [{"total_num_frames": 30, "fps": 8, "duration": 3.75}],
    },
}
"""Prompts for the whole model."""


def chat_of(kind: str, case: dict[str, Any]) -> dict[str, Any]:
    """What the template is given. That of GLM-4.1V knows neither tools nor what they answer."""
    chat = {name: case[name] for name in ("messages", "tools", "enable_thinking") if name in case}
    messages = chat.pop("messages")
    if kind == "glm4v":
        roles, chat = {"tool": "user"}, {}
        messages = [{"role": roles.get(m["role"], m["role"]), "content": m["content"]} for m in messages]
    return {"conversation": messages, **chat}


TURNS = [
    user("Who are you?"),
    {"role": "assistant", "content": "<think>\nA greeting.\n</think>\nA model."},
    user(IMAGE, "What is this?", VIDEO),
    {"role": "assistant", "reasoning_content": " It purrs. \n", "content": "A cat.\n"},
    user("Sure?"),
]
ERRANDS = [
    {"role": "system", "content": [text("Use tools.")]},
    user("Find a cat and cut it out."),
    {
        "role": "assistant",
        "reasoning_content": "First I search.",
        "content": "",
        "tool_calls": [call("search", query="Katze „süß“", limit=3), call("crop", box=[1, 2, 3], options={"ß": None})],
    },
    {"role": "tool", "content": "3 results"},
    {"role": "tool", "content": [text("The cut:"), IMAGE]},
]

CHATS: dict[str, dict[str, Any]] = {
    "question": {"messages": [user("Hi")]},
    "no generation prompt": {"messages": [user("Hi")], "add_generation_prompt": False},
    "thinking": {"messages": [user("Hi")], "enable_thinking": True},
    "no thinking": {"messages": [user("Hi")], "enable_thinking": False},
    "no thinking, said already": {"messages": [user("Hi /nothink")], "enable_thinking": False},
    "no thinking, of an image": {"messages": [user(IMAGE, "Hi")], "enable_thinking": False},
    "three turns": {"messages": TURNS},
    "three turns, no thinking": {"messages": TURNS, "enable_thinking": False},
    "the last thought is shown": {
        "messages": [user("Hi"), {"role": "assistant", "reasoning_content": "Polite.\n", "content": "Hello"}],
        "add_generation_prompt": False,
    },
    "tools, none called": {"messages": [user("Hi")], "tools": [SEARCH, CROP]},
    "tools, called": {"messages": ERRANDS, "tools": [SEARCH, CROP]},
    "tools, called, no thinking": {"messages": ERRANDS, "tools": [SEARCH, CROP], "enable_thinking": False},
    "tools, answered": {
        "messages": [*ERRANDS, {"role": "assistant", "content": "Here it is."}, user("Thanks!")],
        "tools": [SEARCH],
    },
    "a result with a URL": {
        "messages": [
            *ERRANDS[:3],
            {
                "role": "tool",
                "content": [text("one"), {"type": "image_url", "image_url": {"url": "a.png"}}, text("two")],
            },
        ],
        "tools": [SEARCH],
    },
}
"""Conversations for the family's template."""
