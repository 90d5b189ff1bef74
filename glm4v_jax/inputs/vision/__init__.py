"""Resizing, sampling and cutting of images and videos into patches."""
