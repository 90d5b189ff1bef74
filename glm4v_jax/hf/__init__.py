"""The reference's names and call shapes, a skin over the other rooms: users import it, and no other room does.

- `model`: `Glm4vForConditionalGeneration`: logits, loss, `generate`, saving and loading.
- `multimodal`, `submodels`: `Glm4vModel`, `Glm4vVisionModel`, `Glm4vTextModel`.
- `generate`: `model.generate` over the engine's slots.
- `pipeline`: `pipeline("image-text-to-text")`.
- `forward`: the jitted programs of a forward pass with the reference's optional outputs.
- `outputs`: `Glm4vCausalLMOutputWithPast` and its kin.
"""
