"""The model: ViT, merger, decoder and head as NNX modules on arrays of static shape.

glm4v.py      `Glm4v`, the whole model: encode images and video frames, embed tokens, decode, score
vision.py     the ViT and its merger (`Glm4vVisionModel`)
decoder.py    the GLM-4 decoder (`Glm4vTextModel`); `TextDecoder.run` takes another attention, as an engine has it
layer_attention.py  what the decoder's layers attend to: the tokens of a call, a cache
nn.py         the building blocks: every parameter is created here
layers.py     a stack of equal layers, scanned or one by one; rematerialisation
rope.py       2-D rope of the ViT, M-RoPE of the decoder, rope scaling
kv_cache.py   keys and values of earlier tokens
attention/    one entry point over the kernels of CPU, GPU and TPU
params.py     parameters by path
rules.py      sharding rules for meshes that others make, as serving engines do
lora.py       adapters beside kernels
quantize.py   kernels as 8- or 4-bit integers
runtime.py    the modules as compiled programs take them

Dimension letters: B rows of the batch, T tokens of a call, S slots of the cache, D hidden size, V vocabulary, N layers,
K key and value heads, G query heads of each, H head size, F rotated pairs; R vision rows, L patches of a row, M merged
tokens of a row.
"""
