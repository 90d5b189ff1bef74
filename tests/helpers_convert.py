"""Checkpoints to convert, and safetensors files that no library would write."""

import json
import struct
from pathlib import Path

import numpy as np

from glm4v_jax.checkpoints.hf_write import tensor_shapes
from glm4v_jax.checkpoints.safetensors import SafetensorsFile, open_checkpoint
from glm4v_jax.config.model import Glm4vConfig

CODES = {"bfloat16": "BF16", "float16": "F16", "float32": "F32"}


def files_of(directory):
    """Name -> content of every file in a directory."""
    return {path.name: path.read_bytes() for path in Path(directory).iterdir()}


def read_all(directory):
    """Tensor name -> array, of a checkpoint in Hugging Face layout."""
    files = open_checkpoint(directory)
    return {name: np.array(files.read(name)) for name in files}


def split_file(path):
    """Header, as text, and data of a safetensors file."""
    content = Path(path).read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    return content[8 : 8 + length].decode(), content[8 + length :]


def join_file(path, header, data):
    """Write one, whatever its header says: a dictionary, or text."""
    text = (header if isinstance(header, str) else json.dumps(header)).encode()
    Path(path).write_bytes(struct.pack("<Q", len(text)) + text + data)


def tensors_of_file(path):
    """Tensor name -> array, in the order of the file."""
    file = SafetensorsFile(path)
    return {name: np.array(file.read(name)) for name in file}


def write_hollow(directory, config: Glm4vConfig, plan, dtype="bfloat16"):
    """A checkpoint with headers and no data: its files are holes, which take no room on the disk."""
    shapes, width = tensor_shapes(config), np.dtype(np.float32 if dtype == "float32" else np.float16).itemsize
    for file, names in plan.items():
        header, offset = {}, 0
        for name in names:
            end = offset + int(np.prod(shapes[name])) * width
            header[name] = {"dtype": CODES[dtype], "shape": list(shapes[name]), "data_offsets": [offset, end]}
            offset = end
        path = Path(directory) / file
        join_file(path, header, b"")
        with path.open("r+b") as opened:
            opened.truncate(path.stat().st_size + offset)
    index = {"metadata": {}, "weight_map": {name: file for file, names in plan.items() for name in names}}
    (Path(directory) / "model.safetensors.index.json").write_text(json.dumps(index))
    config.save_pretrained(directory)
