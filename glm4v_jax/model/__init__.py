"""The model: ViT, merger, decoder and head as NNX modules, and the programs that run them."""
