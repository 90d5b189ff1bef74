"""Each kind of checkpoint through Orbax and back: every file as it was, and adapters that PEFT loads."""

import json

import numpy as np
import pytest
from helpers_lora import trained
from helpers_transformers import import_transformers

from convert.to_hf import to_hf
from convert.to_orbax import to_orbax
from glm4v_jax.checkpoints.adapter import save_adapter
from glm4v_jax.checkpoints.hf_write import tensors_of
from glm4v_jax.checkpoints.load import load_model
from glm4v_jax.checkpoints.safetensors import open_checkpoint
from glm4v_jax.config.model import Glm4vConfig
from glm4v_jax.model import lora
from tools.make_family import KINDS


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_orbax_and_back_keeps_every_file(kind, family_checkpoint, tmp_path):
    """Also the tensors of the layer that is not run."""
    source = family_checkpoint(kind)
    to_orbax(source, tmp_path / "orbax")
    to_hf(tmp_path / "orbax", tmp_path / "back", max_shard_size="original")
    files, back = ({path.name: path.read_bytes() for path in where.iterdir()} for where in (source, tmp_path / "back"))
    # Its metadata also has the number of parameters, as transformers writes it.
    index = [json.loads(found.pop("model.safetensors.index.json", b"null")) for found in (files, back)]
    assert kind == "ocr" or index[0]["weight_map"] == index[1]["weight_map"]
    assert files.keys() <= back.keys()
    assert [name for name in files if files[name] != back[name]] == []


def skeleton(shapes):
    """Modules of the names and shapes of a checkpoint's kernels, for PEFT to wrap: it looks at nothing else."""
    import torch

    root = torch.nn.Module()
    root.prepare_inputs_for_generation = None  # asked for, as of any model that generates
    for name, shape in shapes.items():
        *path, last = name.removesuffix(".weight").split(".")
        place = root
        for part in path:
            if not hasattr(place, part):
                place.add_module(part, torch.nn.Module())
            place = getattr(place, part)
        place.add_module(last, torch.nn.Linear(shape[1], shape[0], bias=False, dtype=torch.float32))
    return root


@pytest.mark.slow
@pytest.mark.filterwarnings("error:Found missing adapter keys")
@pytest.mark.parametrize("kind", KINDS)
def test_adapters_load_in_peft_and_mean_the_same(kind, family_checkpoint, mesh, tmp_path):
    import_transformers()  # PEFT wants it to be importable
    torch, peft = pytest.importorskip("torch"), pytest.importorskip("peft")
    source = family_checkpoint(kind)
    model = load_model(source, Glm4vConfig.from_pretrained(source), dtype="float32", stacked=False)
    adapter = trained(model, lora.LoraConfig(rank=3, alpha=4.5, target=r".*\.(attn|self_attn|mlp|merger)\..*"))
    save_adapter(adapter, tmp_path, str(source))
    files = open_checkpoint(source)
    # As in the reference, there is no layer after the last.
    names = [name for name in files if name.endswith(".weight") and ".layers.2." not in name]
    kernels = {name: files.read(name) for name in names if len(files[name].shape) == 2}
    theirs = skeleton({name: value.shape for name, value in kernels.items()})
    theirs.load_state_dict({name: torch.tensor(value.astype(np.float32)) for name, value in kernels.items()})
    merged = peft.PeftModel.from_pretrained(theirs, tmp_path).merge_and_unload().state_dict()
    ours = {name: np.asarray(value) for name, value in tensors_of(lora.merge_lora(adapter)).items()}
    changed = [name for name, value in kernels.items() if not np.array_equal(merged[name], value.astype(np.float32))]
    targets = json.loads((tmp_path / "adapter_config.json").read_text())
    assert len(changed) > 20, targets
    for name in changed:
        np.testing.assert_allclose(merged[name], ours[name], rtol=0, atol=1e-5, err_msg=name)
