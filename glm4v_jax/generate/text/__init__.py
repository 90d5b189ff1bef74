"""From tokens to text, and what the text says.

- `stream`: token ids to text, as they come; stop strings.
- `thinking`: the thought, the answer and its boxed parts.
- `tool_calls`: calls of functions. `actions`: what an agent on a phone or a page does next.
- `boxes`: boxes and points in an answer, in pixels and drawn.
- `repetition`: a text that has become a loop.
"""
