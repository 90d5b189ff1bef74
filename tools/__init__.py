"""Scripts of the repository that are not part of the package.

- `train_tiny` (`make tiny`) trains the packaged model: on `digit_curriculum`, with `tiny_model`, `tiny_assets` and
  `tiny_text`; `score_tiny` and `digit_scores` measure it.
- `reward_study` (`make rl`) teaches it by reward what it was never taught, `leftmost_digits`; `reward_page` writes the
  page and its figure.
- `make_random`: the random checkpoint of the tests. `make_chat_svg`, `make_report_png`, `make_chat_page_png`: images of
  the docs.
"""
