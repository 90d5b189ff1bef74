"""Training data: formats, samples, packing."""
