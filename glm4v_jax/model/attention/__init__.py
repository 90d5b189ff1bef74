"""Attention: one entry point over the kernels of each platform.

attend.py     attention on the arrays of a mesh: training and prefill, a cache, few queries
mask.py       who sees whom; which blocks a kernel skips
blockwise.py  plain JAX, for any platform: what the other kernels must equal
splash.py     TPU: JAX's splash kernels
cudnn.py      NVIDIA GPUs: cuDNN for plain rows, blocks for the others
"""
