"""The one table between tensor names of a Hugging Face checkpoint and leaves of the model.

A rule names a tensor, a leaf, and the rearrangement between them in einops notation: the left side is the tensor's
shape in PyTorch's layout, the right side the leaf's. Read left to right it loads a checkpoint, right to left it
exports one. Every tensor matches one rule, and every leaf is filled exactly once; all faults are reported together.

Extra layers, after the decoder's last, predict further tokens (MTP). Their tensors are in no rule, as nothing here runs
them: conversions keep them as they are, whatever their names and shapes.

The table is ours, and no conversion script like those of other libraries, because one bijective table serves loading,
exporting, adapters, inspection and Orbax alike, and a test can prove that nothing is lost in it.
"""

import collections
import dataclasses
import re
import types
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, Literal, NamedTuple, get_args

import einops
import numpy as np

from glm4v_jax.checkpoints.safetensors import TensorInfo
from glm4v_jax.config.checks import fault, one_of, raise_faults
from glm4v_jax.config.model import Glm4vConfig
from glm4v_jax.errors import CheckpointError, counted


@dataclasses.dataclass(frozen=True)
class Rule:
    """One row of the table. The leaf has its inputs first, as on disk (`kernel_order`).

    Attributes:
      tensor: name in the checkpoint, without the leading "model."; `{i}` is the layer.
      leaf: path in the model; a leaf under `layers` or `blocks` exists once for each layer.
      layout: einops pattern from the tensor to the leaf; capitals are the sizes that `dimensions` gives.
      part: (axis, number) if the tensor is one slice of a fused leaf; `layout` then gives that slice, without the axis.
      suffix: the end of `tensor` if it is one of those that a quantised weight is stored as (see `compressed_tensors`),
        else empty; `layout` is the weight's.
    """

    tensor: str
    leaf: str
    layout: str
    part: tuple[int, int] | None = None
    suffix: str = ""

    @property
    def layered(self) -> bool:
        """Whether the rule stands for one tensor per layer."""
        return "{i}" in self.tensor

    @property
    def is_linear(self) -> bool:
        """Whether the tensor is the weight [out, in] of a linear layer."""
        return self.leaf.endswith(".kernel") and len(self.axes()[0]) == 2

    @property
    def index(self) -> tuple[Any, ...]:
        """The index of the tensor's slice in a fused leaf; empty if the leaf is not fused."""
        return () if self.part is None else (*(slice(None),) * self.part[0], self.part[1])

    def tensor_shape(self, sizes: Mapping[str, int]) -> tuple[int, ...]:
        """Return the shape that the tensor has in a checkpoint."""
        return self._shape(0, sizes)

    def leaf_shape(self, sizes: Mapping[str, int]) -> tuple[int, ...]:
        """Return the shape that the tensor has in its leaf: without a `part`, that of the leaf of one layer."""
        return self._shape(1, sizes)

    def to_leaf(self, tensor: np.ndarray, sizes: Mapping[str, int]) -> np.ndarray:
        """Return the tensor in the leaf's layout (a view where the layout allows it)."""
        return einops.rearrange(tensor, self.layout, **self._sizes_used(sizes))

    def to_tensor(self, leaf: np.ndarray, sizes: Mapping[str, int]) -> np.ndarray:
        """Invert `to_leaf`."""
        tensor, leaf_layout = self.layout.split("->")
        return einops.rearrange(leaf, f"{leaf_layout} -> {tensor}", **self._sizes_used(sizes))

    def _shape(self, side: int, sizes: Mapping[str, int]) -> tuple[int, ...]:
        return tuple(int(np.prod([sizes[name] for name in axis])) for axis in self.axes()[side])

    def axes(self) -> tuple[list[list[str]], list[list[str]]]:
        """Return the letters of each axis of the tensor, and of the leaf."""
        tensor, leaf = self.layout.split("->")
        return _axes(tensor), _axes(leaf)

    def path(self, layer: int | None) -> str:
        """Return the path of the leaf in a model that keeps its layers one by one."""
        if layer is None:
            return self.leaf
        group = next(group for group in LAYER_GROUPS if self.leaf.startswith(group))
        return f"{group}{layer}.{self.leaf.removeprefix(group)}"

    def _sizes_used(self, sizes: Mapping[str, int]) -> dict[str, int]:
        return {name: sizes[name] for name in set(re.findall(r"[A-Z]\w*", self.layout))}


def _axes(side: str) -> list[list[str]]:
    return [axis.strip("()").split() for axis in re.findall(r"\([^)]*\)|\S+", side)]


DECODER_LAYERS = "language_model.layers."
LAYER_GROUPS = (DECODER_LAYERS, "visual.blocks.")
"""How paths of leaves begin that exist once for each layer."""

Dtype = Literal["float32", "bfloat16", "float16"]
DTYPES: tuple[str, ...] = get_args(Dtype)
"""Dtypes that a checkpoint's tensors may have."""

_TEXT = "language_model.layers.{i}."
_VIT = "visual.blocks.{i}."


def _kernel(name: str, layout: str, leaf: str | None = None) -> Rule:
    """A weight; the leaf has the name of the tensor where no other is given."""
    return Rule(f"{name}.weight", f"{leaf or name}.kernel".replace("{i}.", ""), layout)


def _bias(name: str, layout: str, leaf: str | None = None) -> Rule:
    return Rule(f"{name}.bias", f"{leaf or name}.bias".replace("{i}.", ""), layout)


def _norm(name: str, size: str) -> Rule:
    return Rule(f"{name}.weight", f"{name}.scale".replace("{i}.", ""), f"{size} -> {size}")


def _gated_mlp(tensor: str, leaf: str, dim: str, hidden: str) -> list[Rule]:
    """Separate gate and up projections, one fused kernel [dim, 2, hidden]."""
    fused = _kernel(f"{tensor}gate_proj", f"{hidden} {dim} -> {dim} {hidden}", f"{leaf}gate_up")
    return [
        dataclasses.replace(fused, part=(1, 0)),
        dataclasses.replace(fused, tensor=f"{tensor}up_proj.weight", part=(1, 1)),
        _kernel(f"{tensor}down_proj", f"{dim} {hidden} -> {hidden} {dim}", f"{leaf}down"),
    ]


def _gated_biases(tensor: str, leaf: str, dim: str, hidden: str) -> list[Rule]:
    """Those of `_gated_mlp`; that of gate and up is [2, hidden]."""
    fused = _bias(f"{tensor}gate_proj", f"{hidden} -> {hidden}", f"{leaf}gate_up")
    return [
        dataclasses.replace(fused, part=(0, 0)),
        dataclasses.replace(fused, tensor=f"{tensor}up_proj.bias", part=(0, 1)),
        _bias(f"{tensor}down_proj", f"{dim} -> {dim}", f"{leaf}down"),
    ]


TABLE: tuple[Rule, ...] = (
    _kernel("lm_head", "V D -> D V"),
    Rule("language_model.embed_tokens.weight", "language_model.embed_tokens.embedding", "V D -> V D"),
    _norm("language_model.norm", "D"),
    _norm(_TEXT + "input_layernorm", "D"),
    _norm(_TEXT + "post_self_attn_layernorm", "D"),
    _norm(_TEXT + "post_attention_layernorm", "D"),
    _norm(_TEXT + "post_mlp_layernorm", "D"),
    _kernel(_TEXT + "self_attn.q_proj", "(K G H) D -> D K (G H)"),
    _bias(_TEXT + "self_attn.q_proj", "(K G H) -> K (G H)"),
    _kernel(_TEXT + "self_attn.k_proj", "(K H) D -> D K H"),
    _bias(_TEXT + "self_attn.k_proj", "(K H) -> K H"),
    _kernel(_TEXT + "self_attn.v_proj", "(K H) D -> D K H"),
    _bias(_TEXT + "self_attn.v_proj", "(K H) -> K H"),
    _kernel(_TEXT + "self_attn.o_proj", "D (K G H) -> K G H D"),
    _kernel(_TEXT + "mlp.gate_up_proj", "(Two F) D -> D Two F", _TEXT + "mlp.gate_up"),
    _kernel(_TEXT + "mlp.down_proj", "D F -> F D", _TEXT + "mlp.down"),
    _kernel("visual.patch_embed.proj", "E C T P1 P2 -> (C T P1 P2) E", "visual.patch_embed"),
    _bias("visual.patch_embed.proj", "E -> E", "visual.patch_embed"),
    Rule("visual.embeddings.position_embedding.weight", "visual.position_embedding", "S E -> S E"),
    _norm("visual.post_conv_layernorm", "E"),
    _norm(_VIT + "norm1", "E"),
    _norm(_VIT + "norm2", "E"),
    _kernel(_VIT + "attn.qkv", "(Three N J) E -> E Three N J"),
    _bias(_VIT + "attn.qkv", "(Three N J) -> Three N J"),
    _norm(_VIT + "attn.q_norm", "J"),
    _norm(_VIT + "attn.k_norm", "J"),
    _kernel(_VIT + "attn.proj", "E (N J) -> N J E"),
    _bias(_VIT + "attn.proj", "E -> E"),
    *_gated_mlp(_VIT + "mlp.", _VIT + "mlp.", "E", "W"),
    *_gated_biases(_VIT + "mlp.", _VIT + "mlp.", "E", "W"),
    _norm("visual.post_layernorm", "E"),
    _kernel("visual.downsample", "D E M1 M2 -> (M1 M2 E) D"),
    _bias("visual.downsample", "D -> D"),
    _kernel("visual.merger.proj", "D Din -> Din D"),
    _norm("visual.merger.post_projection_norm", "D"),
    _bias("visual.merger.post_projection_norm", "D -> D"),
    *_gated_mlp("visual.merger.", "visual.merger.mlp.", "D", "I"),
)


def dimensions(config: Glm4vConfig) -> dict[str, int]:
    """Return the sizes that the letters in the table's layouts stand for."""
    text, vision = config.text_config, config.vision_config
    assert text.num_key_value_heads is not None
    patch, merge = vision.patch_size, vision.spatial_merge_size
    return {
        "V": text.vocab_size, "D": text.hidden_size, "Din": text.hidden_size, "F": text.intermediate_size,
        "K": text.num_key_value_heads, "G": text.num_key_value_groups, "H": text.head_dim, "Two": 2,
        "E": vision.hidden_size, "N": vision.num_heads, "J": vision.head_dim, "Three": 3, "S": vision.position_grid**2,
        "W": vision.mlp_width, "I": vision.merger_width, "C": vision.in_channels, "T": vision.temporal_patch_size,
        "P1": patch, "P2": patch, "M1": merge, "M2": merge,
    }  # fmt: skip


def rules(config: Glm4vConfig) -> list[Rule]:
    """Return the table's rows that a model of this configuration has."""
    text, vision, structure = config.text_config, config.vision_config, config.vision_config.structure
    # What a model of another member of the family, or with other switches, does not have.
    present = {
        "lm_head.kernel": not text.tie_word_embeddings,
        **{f"language_model.layers.self_attn.{x}_proj.bias": text.structure.attention_bias for x in "qkv"},
        "visual.position_embedding": structure.position_table,
        "visual.post_conv_layernorm.scale": structure.post_conv_norm,
        "visual.blocks.attn.qkv.bias": vision.attention_bias,
        **{f"visual.blocks.attn.{x}_norm.scale": structure.qk_norm for x in "qk"},
        **{f"visual.blocks.{x}.bias": vision.mlp_bias for x in ("attn.proj", "mlp.gate_up", "mlp.down")},
    }
    return [rule for rule in TABLE if present.get(rule.leaf, True)]


class LeafPart(NamedTuple):
    """What a tensor fills: the leaf of a rule, or a slice of it, in one layer if there are several.

    Attributes:
      rule: row of the table.
      layer: number of the layer; None for leaves that exist once.
    """

    rule: Rule
    layer: int | None

    @property
    def path(self) -> str:
        """Path of the leaf in a model that keeps its layers one by one."""
        return self.rule.path(self.layer)


def stacked_path(path: str) -> tuple[str, int | None]:
    """Return the path that a layer's leaf has where layers are stacked, and the layer.

    >>> stacked_path("visual.blocks.3.norm1.scale")
    ('visual.blocks.stacked.norm1.scale', 3)
    >>> stacked_path("lm_head.kernel")
    ('lm_head.kernel', None)
    """
    if (found := _LAYER.match(path)) is None:
        return path, None
    return f"{found[1]}stacked.{path[found.end() :]}", int(found[2])


def layerless_path(path: str) -> str:
    """Return the path of a layer's leaf without the layer, as the table has it.

    >>> layerless_path("visual.blocks.3.norm1.scale")
    'visual.blocks.norm1.scale'
    """
    return stacked_path(path)[0].replace(".stacked.", ".")


_LAYER = re.compile(rf"({'|'.join(map(re.escape, LAYER_GROUPS))})(\d+)\.")


def canonical(name: str) -> str:
    """Return a tensor's name as the table spells it: checkpoints come with and without prefixes.

    >>> canonical("model.language_model.norm.weight")  # as transformers 4.57 and 5.x write it
    'language_model.norm.weight'
    >>> canonical("model.norm.weight")
    'language_model.norm.weight'
    """
    name = name.removeprefix("model.")
    return f"language_model.{name}" if name.startswith(("layers.", "embed_tokens.", "norm.")) else name


def wanted(config: Glm4vConfig) -> dict[str, LeafPart]:
    """Return canonical name -> what it fills, for every tensor that a model of this configuration needs."""
    found: dict[str, LeafPart] = {}
    for rule in rules(config):
        if rule.layered:
            text = rule.leaf.startswith("language_model")
            layers = config.text_config.num_hidden_layers if text else config.vision_config.depth
            found |= {rule.tensor.format(i=i): LeafPart(rule, i) for i in range(layers)}
        else:
            found[rule.tensor] = LeafPart(rule, None)
    return found


def tensor_rules(config: Glm4vConfig) -> dict[str, LeafPart]:
    """Return name, as transformers 4.57 and 5.x write it, -> what it fills; layer by layer, as it does."""
    # The reference registers its modules in this order.
    modules = ("visual.", "language_model.", "lm_head.")

    def order(item: tuple[str, LeafPart]) -> tuple[int, int]:
        name, (_, layer) = item
        return next(i for i, module in enumerate(modules) if name.startswith(module)), -1 if layer is None else layer

    return {
        name if name.startswith("lm_head.") else f"model.{name}": part
        for name, part in sorted(wanted(config).items(), key=order)
    }


def leaf_shapes(config: Glm4vConfig) -> dict[str, tuple[int, ...]]:
    """Return path -> shape of every leaf of a model that keeps its layers one by one."""
    sizes, shapes = dimensions(config), {}
    parts = collections.Counter(part.path for part in wanted(config).values())
    for part in wanted(config).values():
        shape = part.rule.leaf_shape(sizes)
        if part.rule.part is not None:
            axis, _ = part.rule.part
            shape = (*shape[:axis], parts[part.path], *shape[axis:])
        shapes[part.path] = shape
    return shapes


def match(config: Glm4vConfig, infos: Mapping[str, TensorInfo], where: str) -> dict[str, LeafPart]:
    """Match a checkpoint's tensors against the table; `where` names the checkpoint in errors.

    Returns:
      Name in the checkpoint -> what it fills, for every tensor that the model needs, in the table's order.

    Raises:
      CheckpointError: tensors are missing, unexpected, there twice, of a wrong shape or dtype; all of them are listed.
    """
    sizes, expected = dimensions(config), wanted(config)
    check_depths(config, map(canonical, infos), where)
    shapes = {name: part.rule.tensor_shape(sizes) for name, part in expected.items()}
    names = check_tensors(without_unused(config, infos.items()), shapes, where)
    return {names[key]: part for key, part in expected.items()}


def without_tied_head(config: Glm4vConfig, infos: Iterable[tuple[str, Any]]) -> Iterator[tuple[str, Any]]:
    """Skip a copy of the embedding that stands for a tied head; the reference ignores it too."""
    tied = config.text_config.tie_word_embeddings
    return (item for item in infos if not (tied and canonical(item[0]) == "lm_head.weight"))


EXTRA = "extra."
"""How paths of leaves begin that hold tensors of extra layers, by their canonical names."""


def is_extra(config: Glm4vConfig, name: str) -> bool:
    """Whether a tensor, by its canonical name, is of an extra layer."""
    layer = _LAYER.match(name)
    return layer is not None and layer[1] == DECODER_LAYERS and int(layer[2]) in config.text_config.extra_layers


def extra_part(name: str, dimensions: int) -> LeafPart:
    """Return what a tensor of an extra layer fills: a leaf in its own layout."""
    axes = " ".join(f"x{axis}" for axis in range(dimensions))
    name = canonical(name)
    return LeafPart(Rule(name, f"{EXTRA}{name}", f"{axes} -> {axes}"), None)


def without_unused(config: Glm4vConfig, infos: Iterable[tuple[str, Any]]) -> Iterator[tuple[str, Any]]:
    """Skip what a model does not run: a copy of the embedding (`without_tied_head`), and extra layers."""
    return (item for item in without_tied_head(config, infos) if not is_extra(config, canonical(item[0])))


def check_tensors(
    found: Iterable[tuple[str, TensorInfo]],
    expected: Mapping[str, tuple[int, ...]],
    where: str,
    *,
    spell: Callable[[str], str] = canonical,
    any_dtype: bool = False,
    dtypes: Mapping[str, tuple[str, ...]] = types.MappingProxyType({}),
) -> dict[str, str]:
    """Compare the tensors, or leaves, of a checkpoint with those expected of it.

    Args:
      found: names with shapes, dtypes and files.
      expected: canonical name -> shape.
      where: names the checkpoint in errors.
      spell: returns the canonical name.
      any_dtype: whether other dtypes than `DTYPES`, or two kinds of half precision, are accepted.
      dtypes: canonical name -> those of a tensor that are expected in place of `DTYPES`.

    Returns:
      Canonical name -> name found.

    Raises:
      CheckpointError: any of them is missing, unexpected, there twice, of a wrong shape or dtype; all are in
        `faults`, the first in the message.
    """
    names: dict[str, str] = {}
    infos: dict[str, TensorInfo] = {}
    faults = []
    for name, info in found:
        key = spell(name)
        if key not in expected:
            faults.append(f"{name}: found {list(info.shape)}{_in_file(info)}; expected no such tensor")
        elif key in names:
            first = f"{names[key]}{_in_file(infos[names[key]])}"
            faults.append(f"{name}: found{_in_file(info)} besides {first}; expected one of them")
        elif info.shape != expected[key]:
            faults.append(f"{name}: found shape {list(info.shape)}{_in_file(info)}; expected {list(expected[key])}")
        elif not any_dtype and info.dtype.name not in dtypes.get(key, DTYPES):
            choices = one_of(dtypes.get(key, DTYPES))
            faults.append(f"{name}: found {info.dtype.name}{_in_file(info)}; expected {choices}")
        if key not in names:
            names[key], infos[name] = name, info
    if not any_dtype:
        faults += _stray_halves({name: info for name, info in infos.items() if spell(name) not in dtypes})
    faults += [f"{key}: found nothing; expected {list(shape)}" for key, shape in expected.items() if key not in names]
    place = f"{where}: {_misfits(len(faults))} the configuration"
    raise_faults(sorted(faults), CheckpointError, where=place, shown=_SHOWN)
    return names


_SHOWN = 8
"""Faults in a message, which counts the others: a field that was edited gives one for every layer."""


def check_depths(config: Glm4vConfig, names: Iterable[str], where: str) -> None:
    """Check the numbers of layers, which name the field that is wrong where a list of their tensors would not.

    `names` are canonical ones of tensors, or paths of leaves. CheckpointError for other numbers of complete layers.
    """
    counts: dict[str, collections.Counter[int]] = {group: collections.Counter() for group in LAYER_GROUPS}
    for name in names:
        if (layer := _LAYER.match(name)) is not None:
            counts[layer[1]][int(layer[2])] += 1
    fields = {
        "text_config.num_hidden_layers": config.text_config.num_hidden_layers,
        "vision_config.depth": config.vision_config.depth,
    }
    faults = []
    decoder = counts[DECODER_LAYERS]
    for extra in config.text_config.extra_layers:
        if decoder[extra] != decoder[0]:  # or it is one of the decoder's
            del decoder[extra]
    if config.text_config.extra_layers and decoder and decoder[final := max(decoder)] > decoder[0]:
        del decoder[final]  # it is extra, and not where the configuration has it
    for (field, wanted), count in zip(fields.items(), counts.values(), strict=True):
        there, whole = len(count), set(range(len(count))) == set(count)
        if there not in (0, wanted) and whole and count[there - 1] == count[0]:
            faults.append(fault(field, wanted, f"{there}: the tensors are of {counted(there, 'layer')}"))
    raise_faults(faults, CheckpointError, where=where)


def _misfits(count: int) -> str:
    return f"{counted(count, 'tensor')} {'does' if count == 1 else 'do'} not fit"


def _in_file(info: TensorInfo) -> str:
    return f" in {info.file.name}" if info.file.name else ""


def _stray_halves(infos: Mapping[str, TensorInfo]) -> Iterator[str]:
    """Name tensors of the rarer half precision: no checkpoint has both, and one's bits pass for the other's."""
    count = collections.Counter(info.dtype.name for info in infos.values() if info.dtype.name in _HALVES)
    if len(count) == 2:
        usual, rare = (dtype for dtype, _ in count.most_common())
        for name, info in infos.items():
            if info.dtype.name == rare:
                yield f"{name}: found {rare}{_in_file(info)}; expected {usual} like {counted(count[usual], 'other')}"


_HALVES = ("bfloat16", "float16")
