"""The host side: text, images and videos into arrays of static shape, in NumPy; imports no JAX.

- `processor`: messages, images and videos to what the model takes; `processor_options` sorts its options,
  `processor_files` chooses its classes.
- `text`: tokenizer, chat template, placeholders. `media`: files and addresses to arrays. `vision`: arrays to patches.
- `medium`: one image or video, checked. `mrope`: which token stands for which part of it, and the positions.
- `prompt`: one prompt with all of that. `make_batch`, `vision_rows`, `vision_waves`: padding and packing to static
  shapes, and their lists.
- `preview`: what the model will see of a file, for people.
"""
