"""First example of the reference's page: a pipeline. `python -m examples.pipeline_image`."""
# The page's own layout stays.
# fmt: off

import jax.numpy as jnp

from examples.media import IMAGE, MODEL
from glm4v_jax import pipeline

pipe = pipeline(
    task="image-text-to-text",
    model=MODEL,
    dtype=jnp.bfloat16
)
messages = [
    {
        "role": "user",
        "content": [
            {
                "type": "image",
                "url": IMAGE,
            },
            { "type": "text", "text": "Describe this image."},
        ]
    }
]
print(pipe(text=messages,max_new_tokens=20, return_full_text=False))
