"""Text to tokens.

- `messages`: checks of a conversation, and the media in it. `chat_template`: from a conversation to text. `literals`:
  special tokens in what people write. `encode`: prompts to arrays.
- `placeholders`: images and videos as text. `tokenizer`: text to ids, with `special_tokens` and `tokenizer_options`.
"""
