"""Second example of the reference's page: an image. `python -m examples.image_chat`."""
# ruff: noqa: B905
# The page's own layout stays.
# fmt: off

import jax.numpy as jnp

from examples.media import IMAGE, MODEL
from glm4v_jax import Glm4vForConditionalGeneration
from glm4v_jax import Glm4vProcessor as AutoProcessor

model = Glm4vForConditionalGeneration.from_pretrained(
    MODEL,
    dtype=jnp.bfloat16,
    attn_implementation="sdpa"
)
processor = AutoProcessor.from_pretrained(MODEL)
messages = [
    {
        "role":"user",
        "content":[
            {
                "type":"image",
                "url": IMAGE
            },
            {
                "type":"text",
                "text":"Describe this image."
            }
        ]
    }

]

inputs = processor.apply_chat_template(
    messages,
    add_generation_prompt=True,
    tokenize=True,
    return_dict=True,
    return_tensors="np"
)

generated_ids = model.generate(**inputs, max_new_tokens=128)
generated_ids_trimmed = [
            out_ids[len(in_ids) :] for in_ids, out_ids in zip(inputs.input_ids, generated_ids)
]
output_text = processor.batch_decode(
       generated_ids_trimmed, skip_special_tokens=True, clean_up_tokenization_spaces=False
)
print(output_text)
