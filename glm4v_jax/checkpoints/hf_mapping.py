"""The one table between tensor names of a Hugging Face checkpoint and leaves of the model.

A rule names a tensor, a leaf, and the rearrangement between them in einops notation: the left side is the tensor's
shape in PyTorch's layout, the right side the leaf's. Read left to right it loads a checkpoint, right to left it
exports one. Every tensor matches one rule, and every leaf is filled exactly once; what does not fit is reported all
together.
"""

import collections
import dataclasses
import re
from collections.abc import Iterable, Mapping

import einops
import numpy as np

from glm4v_jax.config.model import Glm4vConfig
from glm4v_jax.errors import CheckpointError

_HALVES = ("bfloat16", "float16")


@dataclasses.dataclass(frozen=True)
class Rule:
    """One row of the table.

    tensor: name in the checkpoint, without the leading "model."; `{i}` is the layer.
    leaf: path in the model; a leaf under `layers` or `blocks` exists once for each layer.
    layout: einops pattern from the tensor to the leaf; capitals are the sizes that `dimensions` gives.
    part: (axis, index) if the tensor is one slice of a fused leaf; `layout` then gives that slice, without the axis.
    """

    tensor: str
    leaf: str
    layout: str
    part: tuple[int, int] | None = None

    @property
    def layered(self) -> bool:
        """Whether the rule stands for one tensor a layer."""
        return "{i}" in self.tensor

    def tensor_shape(self, sizes: Mapping[str, int]) -> tuple[int, ...]:
        """The shape that the tensor has in a checkpoint."""
        return self._shape(0, sizes)

    def leaf_shape(self, sizes: Mapping[str, int]) -> tuple[int, ...]:
        """The shape that the tensor has in its leaf, which without a `part` is the shape of the leaf of one layer."""
        return self._shape(1, sizes)

    def to_leaf(self, tensor: np.ndarray, sizes: Mapping[str, int]) -> np.ndarray:
        """The tensor in the leaf's layout (a view where the layout allows it)."""
        return einops.rearrange(tensor, self.layout, **self._sizes_used(sizes))

    def to_tensor(self, leaf: np.ndarray, sizes: Mapping[str, int]) -> np.ndarray:
        """The inverse of `to_leaf`."""
        tensor, leaf_layout = self.layout.split("->")
        return einops.rearrange(leaf, f"{leaf_layout} -> {tensor}", **self._sizes_used(sizes))

    def _shape(self, side: int, sizes: Mapping[str, int]) -> tuple[int, ...]:
        return tuple(int(np.prod([sizes[name] for name in axis])) for axis in self.axes()[side])

    def axes(self) -> tuple[list[list[str]], list[list[str]]]:
        """The letters of each axis of the tensor, and of the leaf."""
        tensor, leaf = self.layout.split("->")
        return _axes(tensor), _axes(leaf)

    def path(self, layer: int | None) -> str:
        """Path of the leaf in a model that keeps its layers one by one."""
        if layer is None:
            return self.leaf
        group = next(group for group in LAYER_GROUPS if self.leaf.startswith(group))
        return f"{group}{layer}.{self.leaf.removeprefix(group)}"

    def _sizes_used(self, sizes: Mapping[str, int]) -> dict[str, int]:
        return {name: sizes[name] for name in set(re.findall(r"[A-Z]\w*", self.layout))}


def _axes(side: str) -> list[list[str]]:
    return [axis.strip("()").split() for axis in re.findall(r"\([^)]*\)|\S+", side)]


LAYER_GROUPS = ("language_model.layers.", "visual.blocks.")
"""What the paths of leaves begin with that exist once for each layer."""

DTYPES = ("float32", "bfloat16", "float16")
"""What a checkpoint's tensors may be."""

_TEXT = "language_model.layers.{i}."
_VIT = "visual.blocks.{i}."


def _norm(tensor: str, leaf: str, size: str) -> Rule:
    return Rule(f"{tensor}.weight", f"{leaf}.scale", f"{size} -> {size}")


def _gated_mlp(tensor: str, leaf: str, dim: str, hidden: str) -> list[Rule]:
    """Separate gate and up projections, one fused kernel [dim, 2, hidden]."""
    return [
        Rule(f"{tensor}gate_proj.weight", f"{leaf}gate_up.kernel", f"{hidden} {dim} -> {dim} {hidden}", (1, 0)),
        Rule(f"{tensor}up_proj.weight", f"{leaf}gate_up.kernel", f"{hidden} {dim} -> {dim} {hidden}", (1, 1)),
        Rule(f"{tensor}down_proj.weight", f"{leaf}down.kernel", f"{dim} {hidden} -> {hidden} {dim}"),
    ]


TABLE: tuple[Rule, ...] = (
    Rule("lm_head.weight", "lm_head.kernel", "V D -> D V"),
    Rule("language_model.embed_tokens.weight", "language_model.embed_tokens.embedding", "V D -> V D"),
    _norm("language_model.norm", "language_model.norm", "D"),
    _norm(_TEXT + "input_layernorm", "language_model.layers.input_layernorm", "D"),
    _norm(_TEXT + "post_self_attn_layernorm", "language_model.layers.post_self_attn_layernorm", "D"),
    _norm(_TEXT + "post_attention_layernorm", "language_model.layers.post_attention_layernorm", "D"),
    _norm(_TEXT + "post_mlp_layernorm", "language_model.layers.post_mlp_layernorm", "D"),
    Rule(_TEXT + "self_attn.q_proj.weight", "language_model.layers.self_attn.q_proj.kernel", "(K G H) D -> D K (G H)"),
    Rule(_TEXT + "self_attn.q_proj.bias", "language_model.layers.self_attn.q_proj.bias", "(K G H) -> K (G H)"),
    Rule(_TEXT + "self_attn.k_proj.weight", "language_model.layers.self_attn.k_proj.kernel", "(K H) D -> D K H"),
    Rule(_TEXT + "self_attn.k_proj.bias", "language_model.layers.self_attn.k_proj.bias", "(K H) -> K H"),
    Rule(_TEXT + "self_attn.v_proj.weight", "language_model.layers.self_attn.v_proj.kernel", "(K H) D -> D K H"),
    Rule(_TEXT + "self_attn.v_proj.bias", "language_model.layers.self_attn.v_proj.bias", "(K H) -> K H"),
    Rule(_TEXT + "self_attn.o_proj.weight", "language_model.layers.self_attn.o_proj.kernel", "D (K G H) -> K G H D"),
    Rule(_TEXT + "mlp.gate_up_proj.weight", "language_model.layers.mlp.gate_up.kernel", "(Two F) D -> D Two F"),
    Rule(_TEXT + "mlp.down_proj.weight", "language_model.layers.mlp.down.kernel", "D F -> F D"),
    Rule("visual.patch_embed.proj.weight", "visual.patch_embed.kernel", "E C T P1 P2 -> (C T P1 P2) E"),
    Rule("visual.patch_embed.proj.bias", "visual.patch_embed.bias", "E -> E"),
    Rule("visual.embeddings.position_embedding.weight", "visual.position_embedding", "S E -> S E"),
    _norm("visual.post_conv_layernorm", "visual.post_conv_layernorm", "E"),
    _norm(_VIT + "norm1", "visual.blocks.norm1", "E"),
    _norm(_VIT + "norm2", "visual.blocks.norm2", "E"),
    Rule(_VIT + "attn.qkv.weight", "visual.blocks.attn.qkv.kernel", "(Three N J) E -> E Three N J"),
    Rule(_VIT + "attn.qkv.bias", "visual.blocks.attn.qkv.bias", "(Three N J) -> Three N J"),
    Rule(_VIT + "attn.proj.weight", "visual.blocks.attn.proj.kernel", "E (N J) -> N J E"),
    *_gated_mlp(_VIT + "mlp.", "visual.blocks.mlp.", "E", "D"),
    _norm("visual.post_layernorm", "visual.post_layernorm", "E"),
    Rule("visual.downsample.weight", "visual.downsample.kernel", "D E M1 M2 -> (M1 M2 E) D"),
    Rule("visual.downsample.bias", "visual.downsample.bias", "D -> D"),
    Rule("visual.merger.proj.weight", "visual.merger.proj.kernel", "D Din -> Din D"),
    Rule("visual.merger.post_projection_norm.weight", "visual.merger.post_projection_norm.scale", "D -> D"),
    Rule("visual.merger.post_projection_norm.bias", "visual.merger.post_projection_norm.bias", "D -> D"),
    *_gated_mlp("visual.merger.", "visual.merger.mlp.", "D", "I"),
)


def dimensions(config: Glm4vConfig) -> dict[str, int]:
    """The sizes that the letters in the table's layouts stand for."""
    text, vision = config.text_config, config.vision_config
    assert text.num_key_value_heads is not None
    patch, merge = vision.patch_size, vision.spatial_merge_size
    return {
        "V": text.vocab_size, "D": text.hidden_size, "Din": text.hidden_size, "F": text.intermediate_size,
        "K": text.num_key_value_heads, "G": text.num_key_value_groups, "H": text.head_dim, "Two": 2,
        "E": vision.hidden_size, "N": vision.num_heads, "J": vision.head_dim, "Three": 3, "S": vision.position_grid**2,
        "I": vision.intermediate_size, "C": vision.in_channels, "T": vision.temporal_patch_size,
        "P1": patch, "P2": patch, "M1": merge, "M2": merge,
    }  # fmt: skip


def rules(config: Glm4vConfig) -> list[Rule]:
    """The table's rows that a model of this configuration has."""
    absent = set()
    if config.text_config.tie_word_embeddings:
        absent.add("lm_head.kernel")
    if not config.vision_config.attention_bias:
        absent.add("visual.blocks.attn.qkv.bias")
    return [rule for rule in TABLE if rule.leaf not in absent]


@dataclasses.dataclass(frozen=True)
class Source:
    """A tensor of a checkpoint and where it goes."""

    tensor: str
    rule: Rule
    layer: int | None


def canonical(name: str) -> str:
    """A tensor's name as the table spells it: checkpoints come with and without prefixes.

    "model.language_model.layers.0.x" (4.57 and 5.x), "language_model.layers.0.x", "model.layers.0.x" -> the second.
    """
    name = name.removeprefix("model.")
    return f"language_model.{name}" if name.startswith(("layers.", "embed_tokens.", "norm.")) else name


def wanted(config: Glm4vConfig) -> dict[str, tuple[Rule, int | None]]:
    """Name, without prefix, -> rule and layer of every tensor that a model of this configuration needs."""
    found: dict[str, tuple[Rule, int | None]] = {}
    for rule in rules(config):
        if rule.layered:
            text = rule.leaf.startswith("language_model")
            layers = config.text_config.num_hidden_layers if text else config.vision_config.depth
            found |= {rule.tensor.format(i=i): (rule, i) for i in range(layers)}
        else:
            found[rule.tensor] = (rule, None)
    return found


def tensor_rules(config: Glm4vConfig) -> dict[str, tuple[Rule, int | None]]:
    """Name, as transformers 4.57 and 5.x write it, -> rule and layer of every tensor; layer by layer, as it does."""
    # The reference registers its parts in this order.
    parts = ("visual.", "language_model.", "lm_head.")

    def place(item: tuple[str, tuple[Rule, int | None]]) -> tuple[int, int]:
        name, (_, layer) = item
        return next(i for i, part in enumerate(parts) if name.startswith(part)), -1 if layer is None else layer

    return {_full_name(name): what for name, what in sorted(wanted(config).items(), key=place)}


def _full_name(tensor: str) -> str:
    return tensor if tensor.startswith("lm_head.") else f"model.{tensor}"


def match(
    config: Glm4vConfig,
    shapes: Mapping[str, tuple[int, ...]],
    where: str,
    dtypes: Mapping[str, np.dtype] | None = None,
    files: Mapping[str, str] | None = None,
) -> list[Source]:
    """Match a checkpoint's tensors against the table.

    Args:
      config: of the model.
      shapes: name -> shape of every tensor in the checkpoint.
      where: names the checkpoint in errors.
      dtypes: name -> dtype; checked where given.
      files: name -> file; named in errors where given.

    Returns:
      One source for every tensor the model needs.

    Raises:
      CheckpointError: tensors are missing, unexpected, doubled, misshapen, no floats, or of two kinds of half
        precision; all of them are listed.
    """
    sizes, expected = dimensions(config), wanted(config)
    tied_head = config.text_config.tie_word_embeddings
    places = {name: f" in {files[name]}" if files else "" for name in shapes}
    found: dict[str, str] = {}
    problems = []
    for name, shape in shapes.items():
        key, place = canonical(name), places[name]
        if tied_head and key == "lm_head.weight":
            continue  # a copy of the embedding, which the reference ignores too
        if key not in expected:
            problems.append(f"unexpected: {name} {list(shape)}{place}")
        elif key in found:
            problems.append(f"doubled: {name}{place} and {found[key]}{places[found[key]]}")
        elif (fitting := expected[key][0].tensor_shape(sizes)) != tuple(shape):
            problems.append(f"misshapen: {name}{place} has shape {list(shape)}, expected {list(fitting)}")
        elif dtypes is not None and dtypes[name].name not in DTYPES:
            problems.append(
                f"of a wrong dtype: {name}{place} is {dtypes[name].name}, expected one of {', '.join(DTYPES)}"
            )
        found.setdefault(key, name)
    if dtypes is not None:
        problems += _stray_halves({name: dtypes[name].name for name in found.values()}, places)
    problems += [
        f"missing: {key} {list(rule.tensor_shape(sizes))}" for key, (rule, _) in expected.items() if key not in found
    ]
    if problems:
        raise CheckpointError(_report(where, problems))
    return [Source(found[key], rule, layer) for key, (rule, layer) in expected.items()]


def _stray_halves(dtypes: Mapping[str, str], places: Mapping[str, str]) -> Iterable[str]:
    """Tensors of the rarer kind of half precision: no checkpoint has both, and the one's bits pass for the other's."""
    count = collections.Counter(dtype for dtype in dtypes.values() if dtype in _HALVES)
    if len(count) == 2:
        usual, rare = (dtype for dtype, _ in count.most_common())
        for name, dtype in dtypes.items():
            if dtype == rare:
                yield f"of a wrong dtype: {name}{places[name]} is {dtype}, expected {usual} like {count[usual]} others"


def _report(where: str, problems: Iterable[str]) -> str:
    problems = sorted(problems)
    return f"{where}: {len(problems)} tensors do not fit the configuration: " + "; ".join(problems)
