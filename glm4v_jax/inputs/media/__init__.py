"""Fetching and decoding of image and video files.

- `fetch`: paths, addresses, base64 text to bytes. `load`: those, and whatever else shows something, to arrays.
- `container`: what a file is, by its first bytes. `decode`: video files to frames, by decord, PyAV or Pillow.
- `quiet`: what these libraries print.
- `array_layout`: where the channels are. `threads`: work on all cores.
"""
