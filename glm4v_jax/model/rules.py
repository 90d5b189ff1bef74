"""Rules for meshes that others make, as serving engines do: one axis that shards heads, MLPs and vocabulary."""

from jax.sharding import AbstractMesh, Mesh

from glm4v_jax.config.checks import fault
from glm4v_jax.config.model import Glm4vConfig
from glm4v_jax.devices.mesh import RULES, Rules
from glm4v_jax.errors import ConfigError


def rules_for(config: Glm4vConfig, mesh: Mesh | AbstractMesh, axis: str = "model") -> Rules:
    """Find the rules that shard a model over one axis of a mesh, as far as its dimensions divide by it.

    >>> rules_for(Glm4vConfig.glm4_1v_9b(), AbstractMesh((1, 4), ("data", "model")))
    Rules(tokens='model', vocab='model', q_groups='model', heads='model', mlp='model')

    On more devices than there are key and value heads, each device has all of these and a part of each one's query
    heads. Along other axes everything is replicated, batches too. A mesh with the axes of `devices.mesh.make_mesh` has
    `RULES`.

    Raises:
      ConfigError: the mesh has no such axis.
    """
    if set(RULES.axes) <= set(mesh.axis_names):
        return RULES
    if axis not in mesh.axis_names:
        raise ConfigError(fault("mesh", mesh.axis_names, f"{axis!r} among its axes, or rules for them"))
    text, vision = config.text_config, config.vision_config
    sizes = {
        "kv_heads": (text.num_key_value_heads or text.num_attention_heads,),
        "q_groups": (text.num_key_value_groups,),
        "heads": (vision.num_heads,),
        "mlp": (text.intermediate_size, vision.mlp_width, vision.merger_width),
        "vocab": (text.vocab_size,),
    }
    divides = {name: all(size % mesh.shape[axis] == 0 for size in found) for name, found in sizes.items()}
    # One axis shards one dimension of an array.
    divides |= {"q_groups": divides["q_groups"] and not divides["kv_heads"], "patches": not divides["heads"]}
    return Rules(tokens=axis, **{name: axis for name, does in divides.items() if does})
