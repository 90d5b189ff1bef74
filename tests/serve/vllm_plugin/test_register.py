"""Registration in processes of vLLM: fake distributions and modules of tpu-inference, which are really imported."""

import importlib
import importlib.metadata
import json
import logging
import subprocess
import sys
import tomllib

import pytest
from helpers_paths import ROOT

from glm4v_jax.config.family import ARCHITECTURES
from glm4v_jax.serve import vllm_plugin

LOADER = "tpu_inference.models.common.model_loader"
MODULE = """
_MODEL_REGISTRY = {}

def _get_model_architecture(config):
    _MODEL_REGISTRY["Qwen2ForCausalLM"] = "in-tree"
    for name in config["architectures"]:
        if name in _MODEL_REGISTRY:
            return _MODEL_REGISTRY[name]
    raise ValueError(f"{name}: falling back to vLLM")
"""


@pytest.fixture
def installed(tmp_path, monkeypatch):
    """A function: installs versions of the distributions, and a loader, for this process."""

    def install(module=MODULE, **versions):
        for name, version in ({"vllm_tpu": "0.32.0", "tpu_inference": "0.32.0"} | versions).items():
            folder = tmp_path / f"{name}-{version}.dist-info"
            folder.mkdir()
            (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
        parts = LOADER.split(".")
        folder = tmp_path.joinpath(*parts[:-1])
        folder.mkdir(parents=True)
        (folder / f"{parts[-1]}.py").write_text(module)

    for name in [name for name in sys.modules if name.partition(".")[0] == "tpu_inference"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(sys, "meta_path", list(sys.meta_path))
    monkeypatch.syspath_prepend(tmp_path)
    yield install
    for name in [name for name in sys.modules if name.partition(".")[0] == "tpu_inference"]:
        del sys.modules[name]


def look_up(name):
    return importlib.import_module(LOADER)._get_model_architecture({"architectures": [name]})


@pytest.mark.parametrize("imported_before", [False, True])
def test_the_family_is_served_by_this_package(installed, imported_before):
    from glm4v_jax.serve.vllm_plugin.model import Glm4vForVllm

    installed()
    if imported_before:
        importlib.import_module(LOADER)
    for _ in range(2):
        vllm_plugin.register()
    assert (LOADER in sys.modules) == imported_before
    assert [look_up(name) for name in vllm_plugin.CLASSES] == [Glm4vForVllm] * 2
    vllm_plugin.register()
    assert look_up("Qwen2ForCausalLM") == "in-tree"
    with pytest.raises(ValueError, match="falling back to vLLM"):
        look_up("Glm4vMoeForConditionalGeneration")


@pytest.mark.parametrize("versions", [{"tpu_inference": "0.33.0"}, {"vllm_tpu": "0.31.0"}])
def test_with_other_versions_vllm_serves_its_own_class(installed, versions, caplog):
    installed(**versions)
    vllm_plugin.register()
    with pytest.raises(ValueError, match="falling back to vLLM"):
        look_up("Glm4vForConditionalGeneration")
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    (version,) = versions.values()
    assert version in record.getMessage() and "tpu-inference 0.32.0" in record.getMessage()


@pytest.mark.parametrize("module", ["_MODEL_REGISTRY = {}", "def _get_model_architecture(config): raise ValueError"])
def test_where_the_private_table_has_moved_vllm_serves_its_own_class(installed, module, caplog):
    installed(module)
    vllm_plugin.register()
    before = vars(importlib.import_module(LOADER)).get("_get_model_architecture")
    (record,) = caplog.records
    assert "_MODEL_REGISTRY" in record.getMessage()
    assert vars(sys.modules[LOADER]).get("_get_model_architecture") is before


def test_without_tpu_inference_nothing_happens(caplog, monkeypatch):
    monkeypatch.setattr(sys, "meta_path", list(sys.meta_path))
    before = list(sys.meta_path)
    vllm_plugin.register()
    assert sys.meta_path == before and not caplog.records


def test_the_entry_point_imports_neither_jax_nor_torch_nor_vllm():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    (value,) = project["entry-points"]["vllm.general_plugins"].values()
    program = (
        "import importlib.metadata, json, sys; "
        f"importlib.metadata.EntryPoint('glm4v_jax', {value!r}, 'vllm.general_plugins').load()(); "
        "print(json.dumps(sorted(name for name in sys.modules if '.' not in name)))"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    assert not {"jax", "flax", "torch", "vllm", "tpu_inference", "numpy"} & set(json.loads(done.stdout))


def test_the_classes_are_those_of_the_family():
    assert set(vllm_plugin.CLASSES) <= {architecture.model_class for architecture in ARCHITECTURES.values()}


def test_the_extra_has_the_versions_that_the_plug_in_is_written_for():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    pins = [requirement.partition(";")[0] for requirement in project["optional-dependencies"]["vllm-tpu"]]
    assert pins == [f"{name}=={version}" for name, version in vllm_plugin.VERSIONS.items()]
