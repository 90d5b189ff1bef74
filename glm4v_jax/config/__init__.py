"""Settings of the model and of generation: checked when they are made, read from the files of checkpoints. No JAX.

checks.py        constraints of settings: declared in annotations, reported in one grammar
model.py         `Glm4vConfig` and its text and vision parts: `config.json`
rope_scaling.py  `rope_scaling` of the text part
generation.py    `GenerationConfig`: `generation_config.json`
presets.py       named sampling options of the authors' scripts
"""
