"""The options that commands share, in groups: the model, what it is shown, and how it generates."""

import contextlib
import dataclasses
import os
import re
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast, get_args

import tyro

from glm4v_jax.config.checks import CacheDtype, PositiveNumber, fault, one_of, raise_faults
from glm4v_jax.config.presets import PRESETS, preset
from glm4v_jax.config.quantization import Scheme
from glm4v_jax.console.progress import Progress
from glm4v_jax.errors import CheckpointError, ConfigError, GenerationError, MediaError, named, naming, not_there
from glm4v_jax.files import ADAPTER_CONFIG, base_of, check_config, model_directory, read_text
from glm4v_jax.planning.mesh_presets import PRESETS as MESH_PRESETS
from glm4v_jax.planning.mesh_presets import check_text, mesh_for
from glm4v_jax.tiny import TINY_CHECKPOINT

if TYPE_CHECKING:
    from jax.sharding import Mesh

    from glm4v_jax.config.generation import GenerationConfig
    from glm4v_jax.config.model import Glm4vConfig
    from glm4v_jax.generate.engine import Engine
    from glm4v_jax.inputs.processor import Glm4vProcessor

MODEL = "GLM4V_MODEL"
"""The environment variable for the model where no option names it."""

CACHE_DTYPES = get_args(CacheDtype)
DTYPES = ("auto", "float32", "bfloat16", "float16")
SCHEMES = get_args(Scheme)

NEW_TOKENS = 2048
"""Enough for a thought and an answer, where there is no other limit."""
TINY_NEW_TOKENS = 64
"""Twice as many as the tiny model's longest answer has."""

DEFAULT_MODEL = os.environ.get(MODEL) or str(TINY_CHECKPOINT)
DEFAULT_MODEL_HINT = "(default: $GLM4V_MODEL, or the tiny model in the package, which reads handwritten digits)"

FROM_CHECKPOINT = "(default: the preset's, or the checkpoint's)"


def _listed(intro: str, descriptions: Mapping[str, Any]) -> str:
    """Help that lists presets, a line each."""
    lines = [f"- {name}: {known.description}" for name, known in descriptions.items()]
    # tyro breaks lines at commas, of numbers too.
    return re.sub(r"(?<=\d),(?=\d)", "", "\n".join([intro, *lines]))


@dataclasses.dataclass(kw_only=True)
class ModelOptions:
    """The model, and the devices it runs on."""

    directory: Annotated[
        str, tyro.conf.arg(name="model", metavar="DIR|NAME", help_behavior_hint=DEFAULT_MODEL_HINT)
    ] = DEFAULT_MODEL
    """Checkpoint in Hugging Face or Orbax format: a directory, or a model's name in the local Hugging Face cache."""

    adapter: Annotated[str | None, tyro.conf.arg(metavar="DIR")] = None
    """Adapter in PEFT's format, as `glm4v train` writes it, applied beside the weights. Without --model and
    $GLM4V_MODEL, its base model is loaded."""

    dtype: Annotated[
        # Not a Literal with None: tyro would list None among the choices.
        str | None,
        tyro.conf.arg(
            metavar=f"{{{','.join(DTYPES)}}}", help_behavior_hint="(default: float32 on a CPU, bfloat16 elsewhere)"
        ),
    ] = None
    """Data type of weights and activations; auto is the checkpoint's."""

    quantize: Annotated[
        str | None, tyro.conf.arg(metavar=f"{{{','.join(SCHEMES)}}}", help_behavior_hint="(default: none)")
    ] = None
    """Weights as integers, for less memory: int8 is as good as exact; int4 takes half of it in the decoder, and costs
    some quality."""

    cache_dtype: Annotated[
        # Not a Literal, whose errors are not one line.
        str,
        tyro.conf.arg(
            metavar=f"{{{','.join(CACHE_DTYPES)}}}", help_behavior_hint="(default: auto, that of the activations)"
        ),
    ] = "auto"
    """Data type of the KV cache. int8 takes about half the memory of bfloat16 and a quarter of float32's: for long
    contexts and many slots."""

    mesh: Annotated[
        str | None,
        tyro.conf.arg(
            metavar="PRESET|AXES",
            help=_listed("How to split the model over devices: axes as fsdp=4,kv=2, or a preset:", MESH_PRESETS),
            help_behavior_hint="\n(default: one device)",
        ),
    ] = None

    def check(self) -> None:
        """Check the options before anything slow begins, and find the model's directory.

        Raises:
          CheckpointError, ConfigError: there is no such directory, data type, or preset or axis of a mesh.
        """
        if self.adapter is not None:
            check_adapter(self.adapter)
            if self.directory == str(TINY_CHECKPOINT):  # nobody has named a model
                self.directory = base_of(self.adapter)
        self.directory = find_model(self.directory)
        choices = {
            "--dtype": (self.dtype, DTYPES),
            "--quantize": (self.quantize, SCHEMES),
            "--cache-dtype": (self.cache_dtype, CACHE_DTYPES),
        }
        raise_faults(
            [
                fault(name, found, one_of(known, found))
                for name, (found, known) in choices.items()
                if found is not None and found not in known
            ]
        )
        if self.mesh is not None:
            check_text(self.mesh)

    def placed(self, config: "Glm4vConfig", default: str | None = None) -> "Mesh | None":
        """The mesh of these devices that is asked for, or `default` where no option names one.

        ConfigError if it needs more devices than there are, or does not divide the model.
        """
        asked = self.mesh or default
        if asked is None:
            return None
        with contextlib.nullcontext() if self.mesh is None else naming("--mesh", ConfigError):
            return mesh_for(asked, config, scheme=self.quantize or "none")

    @property
    def sources(self) -> list[str]:
        """The directories that answers depend on: the model's, and an adapter's."""
        return [self.directory, *([] if self.adapter is None else [self.adapter])]

    @property
    def precision(self) -> str | None:
        """The options that say in which numbers the model computes; None if there are none."""
        scheme = None if self.quantize == "none" else self.quantize
        cache = None if self.cache_dtype == "auto" else f"cache {self.cache_dtype}"
        return " ".join(filter(None, (self.dtype, scheme, cache))) or None

    def load(self, processor: "Glm4vProcessor", num_slots: int = 1, *, tokens: int = 0) -> "Engine":
        """Load the weights into an engine.

        Args:
          processor: of the model.
          num_slots: see `Engine`.
          tokens: of prompt and answer together, if they are known: their KV cache must fit beside the weights.

        Raises:
          CheckpointError: what is wrong with the weights or the adapter.
          ConfigError: the mesh needs more devices than there are, or does not divide the model.
          MemoryShortageError: there is too little memory.
        """
        from glm4v_jax.config.model import Glm4vConfig
        from glm4v_jax.devices.compilation_cache import use_compilation_cache

        use_compilation_cache()
        from glm4v_jax.devices.distributed import agree, check_devices, several

        config = Glm4vConfig.from_pretrained(self.directory)
        mesh = self.placed(config, "latency" if several() else None)
        if mesh is not None:
            check_devices(mesh)
            given = mesh.shape, self.precision, num_slots, config, self.adapter is None
            agree("mesh, model, adapter, dtypes, quantize and slots", given)
            if mesh.size > 1:
                from glm4v_jax.planning.parameter_layout import mesh_text

                print(f"mesh {mesh_text(mesh.shape)}", file=sys.stderr, flush=True)
        if _is_tiny(self.directory):
            print(
                "using the tiny model in the package, which reads handwritten digits; --model DIR for another",
                file=sys.stderr,
                flush=True,
            )
        from glm4v_jax.checkpoints.load import load_runtime, resolve_dtype
        from glm4v_jax.generate.engine import Engine
        from glm4v_jax.planning.memory_table import cache_bytes

        sizes = {} if mesh is None else dict(mesh.shape)
        dtype = self.cache_dtype
        if dtype == "auto":
            dtype = resolve_dtype("bfloat16" if self.dtype == "auto" else self.dtype).name
        reserve = cache_bytes(config, sizes, num_slots, tokens, dtype) if tokens else 0
        with Progress("loading the weights") as progress:
            runtime = load_runtime(
                self.directory, dtype=self.dtype, mesh=mesh, quantize=self.quantize, adapter=self.adapter,
                reserve=reserve, progress=progress.update,
            )  # fmt: skip
        return Engine(runtime, processor, num_slots=num_slots, cache_dtype=cast(CacheDtype, self.cache_dtype))


@dataclasses.dataclass(kw_only=True)
class MediaOptions:
    """What the model is shown."""

    image: Annotated[tyro.conf.UseAppendAction[tuple[str, ...]], tyro.conf.arg(metavar="FILE")] = ()
    """An image: a path or an http(s) address."""

    video: Annotated[tyro.conf.UseAppendAction[tuple[str, ...]], tyro.conf.arg(metavar="FILE")] = ()
    """A video: a path or an http(s) address; placed after the images."""

    fps: Annotated[
        PositiveNumber | None, tyro.conf.arg(metavar="F", help_behavior_hint="(default: the processor's, 2)")
    ] = None
    """Frames per second: as many are taken from a video file, except by GLM-4.6V-Flash and GLM-OCR, which go by its
    length; those of a directory are all taken, and this is the rate they were made at."""

    def check(self) -> None:
        """Check that the files exist, before anything slow begins; MediaError if some do not."""
        check_files("--image", self.image)
        check_files("--video", self.video, directories=True)

    def items(self) -> list[dict[str, Any]]:
        """The images and videos as items of a message."""
        rate = {} if self.fps is None else {"fps": self.fps}
        return [
            *({"type": "image", "url": place} for place in self.image),
            *({"type": "video", "url": place, **rate} for place in self.video),
        ]


@dataclasses.dataclass(kw_only=True)
class SamplingOptions:
    """How the model generates."""

    system: Annotated[str | None, tyro.conf.arg(metavar="TEXT")] = None
    """System prompt."""

    preset: Annotated[
        str | None,
        tyro.conf.arg(
            metavar="NAME",
            help=_listed("Published sampling options; other options override them:", PRESETS),
            help_behavior_hint="\n(default: none)",
        ),
    ] = None

    max_new_tokens: Annotated[
        int | None, tyro.conf.arg(metavar="N", help_behavior_hint="(default: the preset's, or 128)")
    ] = None
    """Stop after at most this many tokens."""

    think_budget: Annotated[int | None, tyro.conf.arg(metavar="N")] = None
    """Close a thought after this many tokens; up to --answer-budget more follow. 0 disables thinking."""

    answer_budget: Annotated[
        int | None, tyro.conf.arg(metavar="N", help_behavior_hint="(default: --max-new-tokens)")
    ] = None
    """Tokens for the answer after a thought that was closed by --think-budget."""

    stop: Annotated[tyro.conf.UseAppendAction[tuple[str, ...]], tyro.conf.arg(metavar="TEXT")] = ()
    """End before this text."""

    stop_repetition: bool = False
    """End when the text repeats itself."""

    json_schema: Annotated[str | None, tyro.conf.arg(metavar="FILE|JSON")] = None
    """Answer, after the thought, with JSON that this JSON schema allows; {} for any JSON object."""

    regex: Annotated[str | None, tyro.conf.arg(metavar="REGEX")] = None
    """Answer, after the thought, with a text that this regular expression matches."""

    choice: Annotated[tyro.conf.UseAppendAction[tuple[str, ...]], tyro.conf.arg(metavar="TEXT")] = ()
    """Answer, after the thought, with one of these texts."""

    do_sample: bool = False
    """Sample, whatever the preset and the checkpoint say."""

    greedy: bool = False
    """Take the most likely token, whatever the preset and the checkpoint say."""

    temperature: Annotated[float | None, tyro.conf.arg(metavar="T", help_behavior_hint=FROM_CHECKPOINT)] = None
    """Divide the logits by this before sampling."""

    top_k: Annotated[int | None, tyro.conf.arg(metavar="K", help_behavior_hint=FROM_CHECKPOINT)] = None
    """Sample from the K most likely tokens; 0 for all."""

    top_p: Annotated[float | None, tyro.conf.arg(metavar="P", help_behavior_hint=FROM_CHECKPOINT)] = None
    """Sample from the most likely tokens whose probabilities add up to P."""

    min_p: Annotated[float | None, tyro.conf.arg(metavar="P", help_behavior_hint=FROM_CHECKPOINT)] = None
    """Sample from tokens with at least P times the probability of the most likely one."""

    repetition_penalty: Annotated[float | None, tyro.conf.arg(metavar="R", help_behavior_hint=FROM_CHECKPOINT)] = None
    """Above 1: make tokens less likely that have occurred."""

    seed: Annotated[int, tyro.conf.arg(metavar="N")] = 0
    """Random seed."""

    def given(self, default_new_tokens: int | None = 128) -> dict[str, Any]:
        """The options that were given, as fields of `GenerationConfig`, without those of the preset.

        The default of `max_new_tokens` is for presets without it. GenerationError if options exclude each other, or
        there is no such preset.
        """
        if self.greedy and self.do_sample:
            raise GenerationError("--greedy: found with --do-sample; expected one of the two")
        sampling = {
            "--temperature": self.temperature,
            "--top-k": self.top_k,
            "--top-p": self.top_p,
            "--min-p": self.min_p,
        }
        if self.greedy and (found := [option for option, value in sampling.items() if value is not None]):
            raise GenerationError(f"--greedy: found with {', '.join(found)}, which are for sampling; expected either")
        if self.temperature == 0:
            raise GenerationError("--temperature: found 0; expected a number above 0, or --greedy")
        from_preset = {} if self.preset is None else preset(self.preset)
        options = {
            "max_new_tokens": with_default(self.max_new_tokens, from_preset, default_new_tokens),
            "think_budget": self.think_budget,
            "answer_budget": self.answer_budget,
            "stop_strings": self.stop or None,
            "stop_repetition": self.stop_repetition or None,
            "json_schema": None if self.json_schema is None else json_text("--json-schema", self.json_schema),
            "regex": self.regex,
            "choices": self.choice or None,
            "do_sample": True if self.do_sample else False if self.greedy else None,
            "temperature": self.temperature,
            "top_k": self.top_k,
            "top_p": self.top_p,
            "min_p": self.min_p,
            "repetition_penalty": self.repetition_penalty,
            "seed": self.seed,
        }
        return {name: value for name, value in options.items() if value is not None}


def json_text(option: str, place: str) -> str:
    """The JSON text of an option: in a file, or the option itself.

    Raises:
      GenerationError: there is no such file, or it is not text.
    """
    if place.lstrip().startswith(("{", "[")):
        return place
    with naming(option, GenerationError):
        if not os.path.isfile(place):
            raise GenerationError(f"found {named(place)}, no such file; expected JSON, or a file with it")
        return read_text(Path(place))


@dataclasses.dataclass(kw_only=True)
class LongSamplingOptions(SamplingOptions):
    """How the model generates."""  # with room for a thought and an answer by default, see `long_answer`

    max_new_tokens: Annotated[
        int | None,
        tyro.conf.arg(
            metavar="N",
            help_behavior_hint=f"(default: the preset's, or {NEW_TOKENS}; {TINY_NEW_TOKENS} for the tiny model)",
        ),
    ] = None
    """Stop after at most this many tokens."""


def long_answer(model: str) -> int:
    """`max_new_tokens` where nothing else sets it and an answer may think as long as it needs."""
    return TINY_NEW_TOKENS if _is_tiny(model) else NEW_TOKENS


def with_default(given: int | None, from_preset: Mapping[str, Any], default: int | None) -> int | None:
    """`max_new_tokens` as an option over a preset's: what was given, None for the preset's, or the default."""
    return given if given is not None or "max_new_tokens" in from_preset else default


def generation_config(directory: str, preset_name: str | None, options: Mapping[str, Any]) -> "GenerationConfig":
    """The checkpoint's options, overridden by a preset's, overridden by `options`, before there is an engine.

    Raises:
      GenerationError: an option or preset is unknown, or out of its range.
    """
    from glm4v_jax.config.generation import GenerationConfig

    merged = {**({} if preset_name is None else preset(preset_name)), **options}
    return GenerationConfig.from_pretrained(directory).replace(**merged)


def find_model(name: str, field: str = "--model") -> str:
    """Find the directory of a model, before anything slow begins; see `model_directory`.

    CheckpointError, which names `field`, if there is none, or it holds something else than a model.
    """
    is_default = field == "--model" and name and name == os.environ.get(MODEL)
    with naming(f"${MODEL}" if is_default else field, CheckpointError):
        directory = model_directory(name)
        # Not pathlib: it takes an empty name for the current directory.
        if not name or not directory.is_dir():
            raise CheckpointError(f"found {named(name)}, {_no_directory(directory)}")
        # A processor alone is enough for some commands.
        if (directory / ADAPTER_CONFIG).is_file() or not any(directory.glob("*.json")):
            check_config(directory)
    return str(directory)


def _no_directory(path: Path) -> str:
    """Say what is at a path that is no checkpoint, and what to do."""
    if path.is_file():
        return "which is a file; expected the directory of a checkpoint"
    from glm4v_jax.config.members import DEFAULT, MEMBERS, find_member

    repository = (find_member(path.name) or MEMBERS[DEFAULT]).repository
    return (
        f"which is not a directory; expected a checkpoint; download it first: hf download {repository} --local-dir DIR"
    )


def check_adapter(directory: str) -> None:
    """Check that a directory holds an adapter, before anything slow begins; CheckpointError if it does not."""
    if not os.path.isfile(os.path.join(directory, ADAPTER_CONFIG)):
        inside = os.path.join(directory, "adapter")  # of a job's output directory
        hint = f"; did you mean {inside}?" if os.path.isfile(os.path.join(inside, ADAPTER_CONFIG)) else ""
        raise CheckpointError(
            f"--adapter: found {named(directory)}, without {ADAPTER_CONFIG}; expected an adapter of PEFT{hint}"
        )


def check_files(option: str, places: Iterable[str], *, directories: bool = False) -> None:
    """Check that files exist, before anything slow begins; addresses are not checked.

    MediaError, which names `option`, for all that do not; `directories` count, as those of a video's frames.
    """
    from glm4v_jax.inputs.media.fetch import is_address

    faults = []
    for place in places:
        if is_address(place):
            continue
        if _is_denied(place):
            faults.append(f"{option}: found {place}, a path without permission to read; expected an image or a video")
        elif not place or not os.path.exists(place):
            faults.append(not_there(place, "an image or a video", option))
        elif os.path.isdir(place) and not directories:
            faults.append(f"{option}: found {place}, a directory; expected an image; frames of a video: --video")
    raise_faults(faults, MediaError)


def _is_denied(place: str) -> bool:
    try:
        os.stat(place)
    except PermissionError:
        return True
    except (OSError, ValueError):
        return False
    return not os.access(place, os.R_OK)


def _is_tiny(model: str) -> bool:
    return os.path.realpath(model) == os.path.realpath(TINY_CHECKPOINT)
