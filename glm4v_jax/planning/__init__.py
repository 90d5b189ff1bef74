"""Would a model fit on some devices, and how fast could it be? Answered without them.

mesh_presets.py          meshes by purpose ("latency", "train") or by axes ("fsdp=4,kv=2")
parameter_layout.py      shape and mesh axes of every parameter; what does not divide by a mesh
memory_table.py          bytes of weights, cache, gradients and optimizer state on each device of a mesh
compile_for_topology.py  the programs compiled for a TPU slice: memory, collectives, copies, least time
hlo.py                   reads a compiled program's text
"""
