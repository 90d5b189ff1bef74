"""Placeholders expand to image tokens and times."""

import numpy as np

from glm4v_jax.inputs.media.load import VideoMetadata
from glm4v_jax.inputs.text.placeholders import Expander, Expansion, expand_video


def test_expansions_are_not_expanded_again():
    """A whole prompt is gone through once: an expansion full of placeholders stays as it is."""
    expand = Expander("<i>", "<v>", [Expansion("<v><i>", 1)], [Expansion("[<i><v>]", 1)])
    rows, types = expand(["a<i>b<v>c<|placeholder|>"])
    assert rows == ["a<v><i>b[<i><v>]c<|placeholder|>"]
    assert types[0].tolist() == [1, 2]


def test_times_of_a_video():
    grid = np.array([3, 2, 2])

    def times(indices, fps):
        meta = VideoMetadata(total_num_frames=100, fps=fps, frames_indices=indices)
        text = expand_video(grid, meta, 2, "#").text
        return text.replace("<|begin_of_image|>#<|end_of_image|>", ",")

    assert times([0, 5, 10, 15, 20, 25], 10.0) == ",0,1,2"
    assert times([9, 10, 19, 20, 29, 30], 10.0) == ",0,1,2"
    assert times([0, 300, 1234, 1300], 10.0) == ",0,123,123"
    assert times([], 10.0) == ",0,0,0"
    assert times(list(range(0, 200, 10)), 10.0) == ",0,2,4"
