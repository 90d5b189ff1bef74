"""The converter between Hugging Face safetensors and Orbax checkpoints: `python -m convert`, `glm4v convert`.

- `commands`: the subcommands.
- `to_orbax`, `to_hf`: the two conversions; `source`: what they share; `casts`: casts that lose no number.
- `quantize`: writes weights as integers.
- `hashes`: SHA-256 of the source's files, for the provenance of an Orbax checkpoint.
- `verify`: compares two checkpoints; `inspect`: lists the tensors of one; `synth`: writes a random one.
"""
