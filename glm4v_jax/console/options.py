"""The options that subcommands share: which model, what it is shown, and how it draws."""

import dataclasses
import hashlib
import os
import sys
import textwrap
from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from glm4v_jax.config.presets import PRESETS, preset
from glm4v_jax.console.console import MODEL, check_model, status
from glm4v_jax.errors import ConfigError, GenerationError, MediaError, named
from glm4v_jax.planning.mesh_presets import PRESETS as MESH_PRESETS
from glm4v_jax.planning.mesh_presets import check_text, mesh_for
from glm4v_jax.tiny import TINY_CHECKPOINT

if TYPE_CHECKING:
    from glm4v_jax.config.generation import GenerationConfig
    from glm4v_jax.generate.engine import Engine
    from glm4v_jax.inputs.processor import Glm4vProcessor

DTYPES = ("auto", "float32", "bfloat16", "float16")

NEW_TOKENS = 2048
"""Enough for a thought and an answer, where there is no other limit."""
TINY_NEW_TOKENS = 64
"""Twice as many as the tiny model's longest answer has."""

DEFAULT_MODEL = os.environ.get(MODEL) or str(TINY_CHECKPOINT)
"""Where no model is named."""
DEFAULT_MODEL_HINT = "(default: $GLM4V_MODEL, or a tiny one in the package, which knows handwritten digits)"

FROM_CHECKPOINT = "(default: the preset's, or the checkpoint's)"

_PRESETS = "Published sampling options, which go over the checkpoint's; options given here go over both.\n" + "\n".join(
    textwrap.fill(f"{name}: {known.description}", 200) for name, known in PRESETS.items()
)

_MESHES = "How devices share the model: axes as fsdp=4,kv=2, or a preset, which takes all devices.\n" + "\n".join(
    textwrap.fill(f"{name}: {known.description}", 200) for name, known in MESH_PRESETS.items()
)


@dataclasses.dataclass(kw_only=True)
class ModelOptions:
    """Which model answers."""

    model: Annotated[str, tyro.conf.arg(metavar="DIR", help_behavior_hint=DEFAULT_MODEL_HINT)] = DEFAULT_MODEL
    """Directory of a GLM-4.1V checkpoint in Hugging Face layout."""

    dtype: Annotated[
        # Not a Literal with None: tyro would offer None among the choices.
        str | None,
        tyro.conf.arg(
            metavar=f"{{{','.join(DTYPES)}}}", help_behavior_hint="(default: float32 on a CPU, bfloat16 elsewhere)"
        ),
    ] = None
    """Of the weights and the arithmetic; auto is the checkpoint's."""

    mesh: Annotated[
        str | None, tyro.conf.arg(metavar="PRESET|AXES", help=_MESHES, help_behavior_hint="(default: one device)")
    ] = None

    debug: bool = False
    """Show the whole traceback of an error."""

    def check(self) -> None:
        """Misses a checkpoint before anything slow begins.

        Raises:
          CheckpointError, ConfigError: there is no such directory, dtype, or preset or axis of a mesh.
        """
        check_model(self.model)
        if self.dtype is not None and self.dtype not in DTYPES:
            raise ConfigError(f"--dtype: found {self.dtype}, expected one of {', '.join(DTYPES)}")
        if self.mesh is not None:
            check_text(self.mesh)

    def load(self, processor: "Glm4vProcessor", num_slots: int = 1) -> "Engine":
        """The engine; this is where weights are read.

        Raises:
          CheckpointError: what is wrong with the weights.
          ConfigError: the mesh needs more devices than there are, or the model does not divide by it.
        """
        from glm4v_jax.config.model import Glm4vConfig
        from glm4v_jax.devices.compilation_cache import use_compilation_cache

        use_compilation_cache()
        from glm4v_jax.devices.distributed import agree, check_devices, several

        asked = self.mesh or ("latency" if several() else None)
        config = Glm4vConfig.from_pretrained(self.model)
        mesh = None if asked is None else mesh_for(asked, config)
        if mesh is not None:
            check_devices(mesh)
            told = repr((mesh.shape, self.dtype, num_slots, config)).encode()
            agree("mesh, model, dtype and slots", hashlib.blake2b(told, digest_size=16).digest())
            if mesh.size > 1:
                from glm4v_jax.planning.parameter_layout import mesh_text

                print(f"mesh {mesh_text(mesh.shape)}", file=sys.stderr, flush=True)
        if _is_tiny(self.model):
            print(
                "answering: the tiny model of the package, which knows handwritten digits; --model DIR for another",
                file=sys.stderr,
                flush=True,
            )
        from glm4v_jax import Glm4vForConditionalGeneration
        from glm4v_jax.generate.engine import Engine

        with status("loading the weights"):
            model = Glm4vForConditionalGeneration.from_pretrained(self.model, dtype=self.dtype, mesh=mesh)
        return Engine(model, processor, num_slots=num_slots)


@dataclasses.dataclass(kw_only=True)
class MediaOptions:
    """What the model is shown."""

    image: Annotated[tyro.conf.UseAppendAction[tuple[str, ...]], tyro.conf.arg(metavar="F")] = ()
    """A picture: path or http(s) address."""

    video: Annotated[tyro.conf.UseAppendAction[tuple[str, ...]], tyro.conf.arg(metavar="F")] = ()
    """A video: path or http(s) address. Videos come after the pictures."""

    def check_media(self) -> None:
        """Misses files before anything slow begins.

        Raises:
          MediaError: a file is not there.
        """
        from glm4v_jax.inputs.media.fetch import is_address

        for option, places in (("--image", self.image), ("--video", self.video)):
            for place in places:
                # A directory may be the frames of a video.
                if not is_address(place) and not os.path.exists(place):
                    raise MediaError(f"{option} {named(place)}: there is no such file or directory")


@dataclasses.dataclass(kw_only=True)
class SamplingOptions:
    """How the model answers."""

    system: Annotated[str | None, tyro.conf.arg(metavar="TEXT", help_behavior_hint="(default: nothing)")] = None
    """What the system says first."""

    preset: Annotated[
        str | None, tyro.conf.arg(metavar="NAME", help=_PRESETS, help_behavior_hint="(default: none)")
    ] = None

    max_new_tokens: Annotated[
        int | None, tyro.conf.arg(metavar="N", help_behavior_hint="(default: the preset's, or 128)")
    ] = None
    """Stop after this many tokens at the latest."""

    think_budget: Annotated[int | None, tyro.conf.arg(metavar="N", help_behavior_hint="(default: none)")] = None
    """Close a thought that is still open after this many tokens; up to --answer-budget more follow."""

    answer_budget: Annotated[
        int | None, tyro.conf.arg(metavar="N", help_behavior_hint="(default: --max-new-tokens)")
    ] = None
    """Tokens for the answer after a thought that has used up its budget."""

    stop: Annotated[tyro.conf.UseAppendAction[tuple[str, ...]], tyro.conf.arg(metavar="TEXT")] = ()
    """End the answer before this text; may be given more than once."""

    stop_repetition: bool = False
    """End a text that goes in circles."""

    do_sample: bool = False
    """Draw the next token, whatever preset and checkpoint say."""

    greedy: bool = False
    """Take the likeliest next token, whatever preset and checkpoint say."""

    temperature: Annotated[float | None, tyro.conf.arg(metavar="T", help_behavior_hint=FROM_CHECKPOINT)] = None
    """Divides the logits before a token is drawn."""

    top_k: Annotated[int | None, tyro.conf.arg(metavar="K", help_behavior_hint=FROM_CHECKPOINT)] = None
    """Draw among the K likeliest tokens."""

    top_p: Annotated[float | None, tyro.conf.arg(metavar="P", help_behavior_hint=FROM_CHECKPOINT)] = None
    """Draw among the likeliest tokens that together reach this probability."""

    min_p: Annotated[float | None, tyro.conf.arg(metavar="P", help_behavior_hint=FROM_CHECKPOINT)] = None
    """Draw among tokens at least this probable, relative to the likeliest."""

    repetition_penalty: Annotated[float | None, tyro.conf.arg(metavar="R", help_behavior_hint=FROM_CHECKPOINT)] = None
    """Over 1: makes tokens that occurred already less likely."""

    seed: int = 0
    """Of the draws."""

    def options(self, default_new_tokens: int | None = 128) -> dict[str, Any]:
        """What was given, as fields of `GenerationConfig`, the preset's not among them.

        Args:
          default_new_tokens: `max_new_tokens` where neither it nor a preset that has one was given.

        Raises:
          GenerationError: options exclude each other, or there is no such preset.
        """
        if self.greedy and self.do_sample:
            raise GenerationError("--greedy and --do-sample: found both, expected one of them at most")
        drawing = {
            "--temperature": self.temperature,
            "--top-k": self.top_k,
            "--top-p": self.top_p,
            "--min-p": self.min_p,
        }
        if self.greedy and (found := [option for option, value in drawing.items() if value is not None]):
            raise GenerationError(f"--greedy and {', '.join(found)}: found both, expected one; --greedy draws nothing")
        if self.temperature == 0:
            raise GenerationError(
                "--temperature: found 0, expected a number above 0; for the likeliest token: --greedy"
            )
        from_preset = {} if self.preset is None else preset(self.preset)
        given = {
            "max_new_tokens": with_default(self.max_new_tokens, from_preset, default_new_tokens),
            "think_budget": self.think_budget,
            "answer_budget": self.answer_budget,
            "stop_strings": self.stop or None,
            "stop_repetition": self.stop_repetition or None,
            "do_sample": True if self.do_sample else False if self.greedy else None,
            "temperature": self.temperature,
            "top_k": self.top_k,
            "top_p": self.top_p,
            "min_p": self.min_p,
            "repetition_penalty": self.repetition_penalty,
            "seed": self.seed,
        }
        return {name: value for name, value in given.items() if value is not None}


@dataclasses.dataclass(kw_only=True)
class LongSamplingOptions(SamplingOptions):
    """The same, with room for a thought and an answer by default; see `long_answer`."""

    max_new_tokens: Annotated[
        int | None,
        tyro.conf.arg(
            metavar="N",
            help_behavior_hint=f"(default: the preset's, or {NEW_TOKENS}; {TINY_NEW_TOKENS} of the tiny model)",
        ),
    ] = None
    """Stop an answer after this many tokens at the latest."""


def long_answer(model: str) -> int:
    """`max_new_tokens` where nothing else says it and an answer may think as long as it needs."""
    return TINY_NEW_TOKENS if _is_tiny(model) else NEW_TOKENS


def _is_tiny(model: str) -> bool:
    return os.path.realpath(model) == os.path.realpath(TINY_CHECKPOINT)


def with_default(given: int | None, from_preset: Mapping[str, Any], default: int | None) -> int | None:
    """`max_new_tokens` as an option over a preset's: what was given, None for the preset's, or the default."""
    return given if given is not None or "max_new_tokens" in from_preset else default


def generation_config(directory: str, preset_name: str | None, options: Mapping[str, Any]) -> "GenerationConfig":
    """The checkpoint's options, changed by a preset's, changed by `options`: `Engine.config` before there is an engine.

    Raises:
      GenerationError: an option or preset is unknown, or out of its range.
    """
    from glm4v_jax.config.generation import GenerationConfig

    given = {**({} if preset_name is None else preset(preset_name)), **options}
    return GenerationConfig.from_pretrained(directory).replace(**given)
