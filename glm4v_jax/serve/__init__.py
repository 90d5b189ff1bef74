"""`glm4v serve`: OpenAI's interface over HTTP, on the engine of `generate`, for one machine.

From the outside in:

- `server`: the port, signals, draining; `app`: the table of routes, the key, what starts and ends with the server.
- `requests`: bodies to messages and options; `responses`: completions to bodies and events.
- `metrics`: what `/metrics` shows; `errors`: `ApiError`, every error that a client sees.
"""
