"""Named sampling options: those that GLM-4.1V was published with, and a few for other purposes.

The published ones contradict each other, and each belongs to something that was shown or measured with it. A preset
changes the options of the checkpoint's `generation_config.json`; what a script did not set is the checkpoint's there
too.

>>> PRESETS["bench"].description
'temperature 0.1, thinking capped at 8,192 tokens, the answer at 8,192'
"""

import dataclasses
import types
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from glm4v_jax.config.checks import one_of
from glm4v_jax.errors import GenerationError

if TYPE_CHECKING:  # it needs NumPy, and the names of presets are wanted in the command line's help
    from glm4v_jax.config.generation import GenerationConfig


@dataclasses.dataclass(frozen=True)
class Preset:
    """Options of `GenerationConfig` that replace the checkpoint's.

    Attributes:
      options: name -> value.
      source: where the numbers are from.
    """

    options: Mapping[str, Any]
    source: str

    def __post_init__(self) -> None:
        object.__setattr__(self, "options", types.MappingProxyType(dict(self.options)))

    @property
    def description(self) -> str:
        """Its numbers, in a line."""
        options = self.options
        if not options:
            return "the checkpoint's generation_config.json"
        parts = [] if options.get("do_sample", True) else ["greedy decoding"]
        parts += [f"{word} {options[name] or 'off'}" for name, word in _WORDS.items() if name in options]
        if "think_budget" in options:
            parts.append(f"thinking capped at {options['think_budget']:,} tokens")
            parts.append(f"the answer at {options['answer_budget']:,}")
        elif "max_new_tokens" in options:
            parts.append(f"at most {options['max_new_tokens']:,} tokens")
        return ", ".join(parts)


_WORDS = {"temperature": "temperature", "top_p": "top-p", "top_k": "top-k", "repetition_penalty": "repetition penalty"}

PRESETS: Mapping[str, Preset] = types.MappingProxyType(
    {
        "cli": Preset(
            # Only the likeliest token is ever left to draw, so this is greedy decoding with a penalty.
            dict(do_sample=True, temperature=1.0, top_p=1e-5, top_k=1, repetition_penalty=1.1, max_new_tokens=8192),
            "zai-org/GLM-V, inference/trans_infer_cli.py",
        ),
        "gradio": Preset(
            # The script passes temperature=None, which switches the checkpoint's 0.8 off: 1.0.
            dict(do_sample=True, temperature=1.0, top_p=1e-5, top_k=2, repetition_penalty=1.1, max_new_tokens=8192),
            "zai-org/GLM-V, inference/trans_infer_gradio.py",
        ),
        "bench": Preset(
            # 8,192 tokens, then `</think><answer>` where there is no answer yet, then 8,192 more.
            dict(do_sample=True, temperature=0.1, max_new_tokens=8192, think_budget=8192, answer_budget=8192),
            "zai-org/GLM-V, inference/trans_infer_bench.py",
        ),
        "api": Preset(
            dict(do_sample=True, temperature=1.0, repetition_penalty=1.0, max_new_tokens=25_000),
            "zai-org/GLM-V before 686f536, inference/vllm_api_request.py",
        ),
        "agent": Preset(
            dict(do_sample=True, temperature=0.001, max_new_tokens=8192),
            "zai-org/GLM-V, examples/gui-agent/glm-41v/gui_agent_41v.py",
        ),
        "hf": Preset(
            {},
            "generation_config.json of zai-org/GLM-4.1V-9B-Thinking (temperature 0.8, top_p 0.6, top_k 2)",
        ),
        "rollouts": Preset(
            # The paper wants rare tokens to be drawn too, which the checkpoint's top_k of 2 would prevent.
            dict(do_sample=True, top_p=1.0, top_k=0),
            "arXiv 2507.01006, section 5.3.2 (top_p; that no top_k is set follows from its reasons)",
        ),
        "ocr": Preset(
            # The same as its temperature 0 and top_k 1.
            dict(do_sample=False, repetition_penalty=1.1, max_new_tokens=8192),
            "zai-org/GLM-OCR, glmocr/config.yaml",
        ),
        "greedy": Preset(
            dict(do_sample=False),
            "not published; for tests and comparisons",
        ),
    }
)


def preset(name: str) -> dict[str, Any]:
    """Copy the options of a preset, for `GenerationConfig.replace`.

    Raises:
        GenerationError: there is no preset of that name; the message lists those there are.
    """
    if name not in PRESETS:
        raise GenerationError(f"preset: found {name!r}; expected {one_of(PRESETS, name)}")
    return dict(PRESETS[name].options)


def configured(config: "GenerationConfig", preset_name: str | None, options: Mapping[str, Any]) -> "GenerationConfig":
    """Change `config` by a preset's options, and then by `options`; None means "not given" throughout.

    Raises:
        GenerationError: an option or preset is unknown or out of its range, or asks for several sequences of a prompt.
    """
    from glm4v_jax.config.generation import OF_THE_MODEL, GenerationConfig

    if preset_name is not None:
        config = config.replace(**preset(preset_name))
    if asked := [name for name in OF_THE_MODEL if options.get(name)]:
        expected = "it in model.generate alone; logprobs=N returns log probabilities here"
        raise GenerationError(f"{asked[0]}: found {options[asked[0]]!r}; expected {expected}")
    # A checkpoint's file may ask for what only `model.generate` returns.
    config = config.replace(**{**options, **dict.fromkeys(OF_THE_MODEL, False)})
    for name in ("num_return_sequences", "num_beams"):
        if (found := getattr(config, name)) != 1:
            raise GenerationError(f"{name}: found {found}; expected 1; model.generate has more")
    for name in ("length_penalty", "early_stopping"):
        if (found := options.get(name)) is not None and found != getattr(GenerationConfig, name):
            raise GenerationError(f"{name}: found {found!r}; expected none: of beam search, which model.generate has")
    return config
