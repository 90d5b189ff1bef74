"""Checkpoints: Hugging Face safetensors and Orbax, read, written and mapped onto the model.

- `safetensors`: files and shards as views of mapped memory; single files written chunk by chunk; `LazyTensor`.
- `hf_mapping`: the one table between tensor names and leaves of the model, and the check of a checkpoint against it.
- `leaves`: the weights as leaves, read from a checkpoint onto devices, or taken from a live model.
- `compressed_tensors`: how the tensors of a quantised checkpoint become integers and scales.
- `plan`: what a model will be in memory, and whether it fits. `load`: a checkpoint in either format -> a model in the
  current mesh.
- `hf_write`: shards and index in Hugging Face layout, of any tensors or of a live model.
- `orbax_read`, `orbax_write`: checkpoints in Orbax format.
- `adapter_files`, `adapter`, `saved_modules`, `merge_adapter`: adapters in PEFT's format as their files have them, from
  and into a model, whole modules in them, and their sum with a checkpoint.
- `atomic_directory`: directories that appear when they are complete.
- `strided_copy`: fast copies into another order of axes.
"""
