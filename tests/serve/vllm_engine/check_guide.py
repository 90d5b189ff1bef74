"""vLLM knows every option of docs/guides/vllm.md and examples/serve; run by `make serve-vllm`."""

import shlex

import yaml
from helpers_paths import ROOT
from vllm.entrypoints.launchers.cli_args import make_arg_parser
from vllm.utils.argparse_utils import FlexibleArgumentParser

MANIFEST = ROOT / "examples" / "serve" / "vllm_tpu.yaml"


def commands():
    """Options of `vllm serve` in the guide and the manifest."""
    guide = (ROOT / "docs" / "guides" / "vllm.md").read_text().replace("\\\n", " ")
    for line in guide.splitlines():
        _, found, options = line.partition("vllm serve ")
        if found and "--" in options and "`" not in line:
            yield shlex.split(options)
    for part in yaml.safe_load_all(MANIFEST.read_text()):
        if part["kind"] == "StatefulSet":
            yield part["spec"]["template"]["spec"]["containers"][0]["args"]


def test_vllm_knows_every_option():
    found = list(commands())
    assert len(found) == 3
    for words in found:
        parser = make_arg_parser(FlexibleArgumentParser())
        known, unknown = parser.parse_known_args(["serve", *words] if parser.prog == "vllm" else words)
        assert not unknown, unknown
        assert known.disable_chunked_mm_input or "--tensor-parallel-size" not in words
