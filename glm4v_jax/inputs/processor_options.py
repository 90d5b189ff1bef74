"""Which part of the processor an option of a call is for, as `ProcessorMixin._merge_kwargs` sorts them."""

import warnings
from collections.abc import Collection, Mapping
from typing import Any

from glm4v_jax.config.checks import fault
from glm4v_jax.config.family import PROCESSORS
from glm4v_jax.errors import ConfigError
from glm4v_jax.inputs.batch_feature import check_device, check_return_tensors
from glm4v_jax.inputs.vision.image import Glm4vImageProcessorFast
from glm4v_jax.inputs.vision.settings import AREA_OPTIONS, MediaProcessor
from glm4v_jax.inputs.vision.video import Glm4vVideoProcessor

TEXT_OPTIONS = frozenset(
    {
        "padding",
        "truncation",
        "max_length",
        "pad_to_multiple_of",
        "padding_side",
        "add_special_tokens",
        "is_split_into_words",
        "split_special_tokens",
        "return_attention_mask",
        "return_token_type_ids",
        "return_special_tokens_mask",
        "return_offsets_mapping",
        "return_length",
        "return_mm_token_type_ids",
    }
)
IMAGE_OPTIONS = frozenset({*MediaProcessor.defaults, *AREA_OPTIONS, "data_format", "input_data_format"}).union(
    *(row.image_settings for row in PROCESSORS.values())
)
VIDEO_OPTIONS = IMAGE_OPTIONS.union(
    {"do_sample_frames", "video_metadata", "num_frames", "fps", "return_metadata"},
    *(row.video_settings for row in PROCESSORS.values()),
)

# The reference's names for nested options, and what each is known to take.
GROUPS: Mapping[str, Collection[str]] = {
    "text_kwargs": TEXT_OPTIONS,
    "images_kwargs": IMAGE_OPTIONS,
    "videos_kwargs": VIDEO_OPTIONS,
    "common_kwargs": frozenset(),
}
# What is known inside of a group only, as in the reference.
_NESTED: Mapping[str, Collection[str]] = {
    "text_kwargs": TEXT_OPTIONS,
    "images_kwargs": IMAGE_OPTIONS.union(Glm4vImageProcessorFast.defaults),
    "videos_kwargs": VIDEO_OPTIONS.union(Glm4vVideoProcessor.defaults),
}
OPTIONS = TEXT_OPTIONS | VIDEO_OPTIONS | {"return_tensors", "device", *GROUPS}


def sort_options(options: Mapping[str, Any]) -> tuple[dict[str, dict[str, Any]], str | None]:
    """Sort the options of a call by the part they are for.

    An option by itself goes to every part that knows it, `size` to images and videos alike; one inside `text_kwargs`,
    `images_kwargs` or `videos_kwargs` goes there only, and one inside `common_kwargs` counts as one by itself.

    Returns {"text_kwargs": {...}, "images_kwargs": {...}, "videos_kwargs": {...}}, and `return_tensors`, None or "np".
    ConfigError if an option is given twice for one part, or is one that only torch has, or a group is no dictionary.
    """
    for group in GROUPS:
        if not isinstance(options.get(group) or {}, Mapping):
            raise ConfigError(fault(group, options[group], "a dictionary of options"))
    nested = {group: dict(options.get(group) or {}) for group in GROUPS}
    flat = {name: value for name, value in options.items() if name not in GROUPS} | nested.pop("common_kwargs")
    return_tensors = flat.pop("return_tensors", None)
    check_return_tensors(return_tensors)
    check_device(flat.pop("device", None))
    unknown = sorted(set(flat) - OPTIONS)
    for group, chosen in nested.items():
        # One kind of tensors for every part, whichever option names it.
        inner_tensors = chosen.pop("return_tensors", None)
        check_return_tensors(inner_tensors)
        return_tensors = return_tensors or inner_tensors
        check_device(chosen.pop("device", None))
        unknown += [f"{name} in {group}" for name in sorted(chosen.keys() - _NESTED[group])]
        nested[group] = chosen = {name: value for name, value in chosen.items() if name in _NESTED[group]}
        twice = sorted(set(chosen) & set(flat) & set(GROUPS[group]))
        if twice:
            raise ConfigError(f"{', '.join(twice)} passed two times: in {group} and as an argument; expected one")
        chosen |= {name: value for name, value in flat.items() if name in GROUPS[group]}
    if unknown:
        warnings.warn(f"unknown options of the processor are ignored: {', '.join(unknown)}", stacklevel=3)
    return nested, getattr(return_tensors, "value", return_tensors)
