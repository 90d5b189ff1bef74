"""Actions of an agent, as the parser of its own agent reads them."""

import pytest

from glm4v_jax.config.thinking import THINKING
from glm4v_jax.errors import GenerationError
from glm4v_jax.generate.text.actions import Action, find_action


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ('do(action="Tap", element=[500,120])', Action("Tap", {"element": [500, 120]})),
        ("do(action='Back')", Action("Back", {})),
        ('do(action="Swipe", start=[1, 2], end=[3, 4])', Action("Swipe", {"start": [1, 2], "end": [3, 4]})),
        ('do(action="Launch", app="微信")', Action("Launch", {"app": "微信"})),
        ('do(action="Tap", element=[1,2], message="Pay (now)?")',
         Action("Tap", {"element": [1, 2], "message": "Pay (now)?"})),
        ('do(action="Note", message="a\nb\tc")', Action("Note", {"message": "a\nb\tc"})),
        # A text is what stands between the outer quotes.
        ('do(action="Type", text="Hello")', Action("Type", {"text": "Hello"})),
        ('do(action="Type_Name", text="Ann")', Action("Type", {"text": "Ann"})),
        ('do(action="Type", text="say "hi" (now)\n1\\n2")', Action("Type", {"text": 'say "hi" (now)\n1\\n2'})),
        ('do(action="Type", text="")', Action("Type", {"text": ""})),
        ('finish(message="All "done".")', Action("finish", {"message": 'All "done".'})),
        # Around it: thoughts, tags, or nothing at all; the last word wins.
        ('<think>Should I do(action="Home")?</think><answer>\ndo(action="Back")\n</answer>', Action("Back", {})),
        ('The page is open. do(action="Back")', Action("Back", {})),
        ('do(action="Back") or finish(message="ok")', Action("finish", {"message": "ok"})),
        ('<think>I go on: do(action="Back")', Action("Back", {})),
        ('do(action="Back")\ndo(action="Home")', Action("Back", {})),
        ('do(action="Type", text="a")\ndo(action="Back")', Action("Type", {"text": "a"})),
        ("do(action='Wait', duration='2 seconds').", Action("Wait", {"duration": "2 seconds"})),
        # Not actions, or parts of one.
        ("", None),
        ("I do nothing.", None),
        ('do(action="Tap", element=[5', None),
        ('do(action="Type", text="Hel', None),
        ('finish(message="Hel', None),
        ("do(action=Tap)", None),
        ('do(action="Tap", element=f())', None),
        ("do(action=" + "(" * 5000 + ")" * 5000, None),
    ],
)  # fmt: skip
def test_actions(text, expected):
    assert find_action(text) == expected


def test_an_answer_without_tags():
    text = '<think>Hm.</think>\ndo(action="Type", text="<answer>")'
    assert find_action(text, thinking=THINKING["plain"]) == Action("Type", {"text": "<answer>"})


def test_points_are_pixels_of_the_screen():
    assert Action("Swipe", {"start": [0, 500], "end": [999, 1000]}).pixels(1080, 2400) == {
        "start": (0, 1200), "end": (1079, 2399)
    }  # fmt: skip
    assert Action("Back", {}).pixels(1080, 2400) == {} and Action("finish", {"message": ""}).is_last
    for element in ("here", [1, "2"], [1, 2, 3], None, [float("inf"), 1]):
        with pytest.raises(GenerationError, match="expected 4 finite numbers, or 2 for a point"):
            Action("Tap", {"element": element}).pixels(1080, 2400)
