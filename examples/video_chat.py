"""Third example of the reference's page: a video. `python -m examples.video_chat`."""
# ruff: noqa: E501
# The page's own layout stays.
# fmt: off

import jax.numpy as jnp

from examples.media import MODEL, VIDEO
from glm4v_jax import Glm4vForConditionalGeneration
from glm4v_jax import Glm4vProcessor as AutoProcessor

processor = AutoProcessor.from_pretrained(MODEL)
model = Glm4vForConditionalGeneration.from_pretrained(
    pretrained_model_name_or_path=MODEL,
    dtype=jnp.bfloat16,
)

messages = [
    {
        "role": "user",
        "content": [
            {
                "type": "video",
                "url": VIDEO,
            },
            {
                "type": "text",
                "text": "discribe this video",
            },
        ],
    }
]
inputs = processor.apply_chat_template(messages, tokenize=True, add_generation_prompt=True, return_dict=True, return_tensors="np", padding=True)
generated_ids = model.generate(**inputs, max_new_tokens=1024, do_sample=True, temperature=1.0)
output_text = processor.decode(generated_ids[0][inputs["input_ids"].shape[1] :], skip_special_tokens=True)
print(output_text)
