"""What the model will see of a file, for people.

- `preview`: the image or video read back from its patches. `placement`: its tokens and positions in a prompt.
- `sheet`: both as one image.
"""
