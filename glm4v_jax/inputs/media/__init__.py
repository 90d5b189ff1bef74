"""Fetching and decoding of image and video files."""
