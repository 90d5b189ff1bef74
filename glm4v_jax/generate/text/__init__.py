"""From tokens to text, and what the text says.

- `stream`: token ids to text, as they come; stop strings.
- `thinking`: the thought, the answer and its boxed parts.
- `boxes`: boxes and points in an answer, in pixels and drawn.
- `repetition`: a text that has become a loop.
"""
