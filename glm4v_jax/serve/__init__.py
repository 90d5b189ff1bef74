"""`glm4v serve`: OpenAI's interface over HTTP, on the engine of `generate`, for one machine.

From the outside in:

- `server`: the port, signals, draining; `app`: the table of routes, the key, the log; `limits`: what a body may weigh.
- `endpoints`: what answers each route. `service`: the engine behind them, and the preparation of requests; `call`: one
  request while it is answered.
- `bodies`, `requests`: fields of requests to messages and options; `media`: images and videos to bytes.
- `responses`: completions to bodies and events.
- `metrics`: what `/metrics` shows; `errors`: `ApiError`, every error that a client sees.
- `page`: the chat page; `preview`: what the model sees of an image or video.

Apart from these, `vllm_plugin` is the model in vLLM's engine, for many machines.
"""
