"""The files of examples/serve for vLLM: manifests are whole, and say the same to Kubernetes and to Ray."""

import pytest
import yaml
from helpers_paths import ROOT

MANIFEST, RAY = (ROOT / "examples" / "serve" / name for name in ("vllm_tpu.yaml", "vllm_ray.yaml"))


@pytest.fixture(scope="module")
def manifest():
    return {(part["kind"], part["metadata"]["name"]): part for part in yaml.safe_load_all(MANIFEST.read_text())}


def test_replicas_get_requests_once_they_are_ready_and_finish_them(manifest):
    pod = manifest["StatefulSet", "glm4v"]["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    for probe in ("startupProbe", "readinessProbe"):
        assert container[probe]["httpGet"] == {"path": "/health", "port": "http"}
    (drain,) = (arg.partition("=")[2] for arg in container["args"] if arg.startswith("--shutdown-timeout"))
    assert pod["terminationGracePeriodSeconds"] > int(drain) > 0


def test_chips_of_a_replica_are_those_of_its_engine_and_its_node(manifest):
    pod = manifest["StatefulSet", "glm4v"]["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    rows, columns = pod["nodeSelector"]["cloud.google.com/gke-tpu-topology"].split("x")
    chips = container["resources"]["limits"]["google.com/tpu"]
    assert chips == int(rows) * int(columns) and f"--tensor-parallel-size={chips}" in container["args"]


def test_compiled_programs_outlive_a_replica(manifest):
    replicas = manifest["StatefulSet", "glm4v"]["spec"]
    (container,) = replicas["template"]["spec"]["containers"]
    (claim,) = replicas["volumeClaimTemplates"]
    (mount,) = (each["mountPath"] for each in container["volumeMounts"] if each["name"] == claim["metadata"]["name"])
    (cache,) = (each["value"] for each in container["env"] if each["name"] == "VLLM_XLA_CACHE_PATH")
    assert cache.startswith(mount)


def test_services_and_policy_select_the_replicas(manifest):
    replicas = manifest["StatefulSet", "glm4v"]["spec"]
    labels = replicas["template"]["metadata"]["labels"]
    assert manifest["Service", replicas["serviceName"]]["spec"]["clusterIP"] == "None"
    assert manifest["Service", "glm4v"]["spec"]["selector"] == labels == replicas["selector"]["matchLabels"]
    assert manifest["NetworkPolicy", "glm4v"]["spec"]["podSelector"]["matchLabels"] == labels


def test_an_engine_of_ray_has_the_options_of_the_manifest(manifest):
    (application,) = yaml.safe_load(RAY.read_text())["applications"]
    (config,) = application["args"]["llm_configs"]
    (container,) = manifest["StatefulSet", "glm4v"]["spec"]["template"]["spec"]["containers"]
    options = dict(arg.removeprefix("--").partition("=")[::2] for arg in container["args"] if arg.startswith("--"))
    given = {name.replace("_", "-"): value for name, value in config["engine_kwargs"].items()}
    of_the_server = {"served-model-name", "port", "shutdown-timeout"}
    assert given.keys() == options.keys() - of_the_server
    for name, value in given.items():
        if options[name]:
            assert yaml.safe_load(options[name]) in (value, *(value if isinstance(value, list) else ()))
