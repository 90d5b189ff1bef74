"""Generation: an engine of slots that decode together, fed by a queue of prompts.

From the outside in:

- `engine`: `Engine`, what users call; `conversation`: turns that keep their KV cache; `warmup`: compile ahead.
- `live`: requests that come at any time, answered by a thread.
- `scheduler`: continuous batching: requests from `prompt_queue` into `slots`, results out of them.
- `sequence`: the host's state of one request: text, stop strings, think budget; `completion`: its result, with
  `token_logprobs`: log probabilities as arrays.
- `slots`: B rows on the device; `prefill_chunks`: prompts cut into chunks; `prefix_reuse`: what rows hold of prompts
  that begin alike; `encode_media`: vision features of images and videos; `feature_pool`: those that are kept.
- `device_steps`, `sampling`: the jitted programs: prefill, copies of rows, first tokens, decode loop.
- `prompt`: anything a user passes as a prompt, prepared.
- `text/`: thoughts, boxes, stop strings, repetition, streaming decoding. `offline/`: files of prompts into files of
  completions.
"""
