"""Attention: one entry point (`attend`) over blockwise, splash and cuDNN kernels."""
