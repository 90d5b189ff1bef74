"""What the members' files say about chats."""

import pytest

from glm4v_jax.config.thinking import THINKING
from glm4v_jax.inputs.processor import Glm4vProcessor


@pytest.mark.parametrize(
    ("kind", "name", "close"),
    [
        ("glm4v", "tagged", ["</think>", "<answer>"]),
        ("flash", "plain", ["</think>", "Ċ"]),
        ("glmga", "plain", ["</think>", "Ċ"]),
        ("ocr", "plain", ["</think>", "Ċ"]),
    ],
)
def test_thoughts_are_written_as_template_and_tokenizer_have_them(family_checkpoint, kind, name, close):
    processor = Glm4vProcessor.from_pretrained(family_checkpoint(kind))
    assert processor.thinking is THINKING[name]
    assert processor.tokenizer.tokenize(processor.thinking.close) == close
    has_switch = "enable_thinking" in processor.template_variables
    assert has_switch == (name == "plain") == ("tools" in processor.template_variables)
    # Without its template the tokenizer says the same.
    processor.chat_template = None
    assert processor.thinking is THINKING[name] and processor.template_variables == frozenset()
