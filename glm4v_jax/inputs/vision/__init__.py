"""Images and videos to patches.

- `settings`: what both processors share. `image`, `video`: the processors.
- `smart_resize`: the target size, and the range of patches. `antialias`: torchvision's resizing of bytes.
- `patches`: normalising and cutting.
"""
