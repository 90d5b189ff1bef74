"""Random prompts for the engine, and what the reference says to them."""

import numpy as np
from reference import to_torch

GREEDY = dict(do_sample=False, eos_token_id=-1)


def random_request(model, rng, text, grids=(), film=None):
    """A prompt of random text around pictures of these grids, then perhaps a video; as a processor would make it."""
    config = model.config
    patch_dim, merge = config.vision_config.patch_dim, config.vision_config.spatial_merge_size
    ids = rng.integers(0, 768, text // 2).tolist()
    for h, w in grids:
        ids += [config.image_start_token_id, *[config.image_token_id] * (h * w // merge**2), config.image_end_token_id]
        ids += rng.integers(0, 768, 2).tolist()
    inputs = {}
    if grids:
        patches = rng.standard_normal((sum(h * w for h, w in grids), patch_dim), np.float32)
        inputs |= {"pixel_values": patches, "image_grid_thw": np.array([(1, h, w) for h, w in grids])}
    if film is not None:
        t, h, w = film
        frame = [config.image_start_token_id, *[config.image_token_id] * (h * w // merge**2), config.image_end_token_id]
        ids += [config.video_start_token_id, *[*frame, 17] * t, config.video_end_token_id]
        patches = rng.standard_normal((t * h * w, patch_dim), np.float32)
        inputs |= {"pixel_values_videos": patches, "video_grid_thw": np.array([film])}
    ids += rng.integers(0, 768, text - text // 2).tolist()
    return {"input_ids": np.array([ids]), **inputs}


def random_requests(model, number, seed):
    """Prompts of random lengths and modalities."""
    rng, made = np.random.default_rng(seed), []
    for _ in range(number):
        grids = [tuple((2 * rng.integers(1, 5, 2)).tolist()) for _ in range(rng.choice([0, 0, 1, 2]))]
        film = (int(rng.integers(1, 4)), 2, 4) if rng.random() < 0.2 else None
        made.append(random_request(model, rng, int(rng.integers(1, 90)), grids, film))
    return made


def their_tokens(model, inputs, new):
    import torch

    model.model.rope_deltas = None
    names = ("input_ids", "attention_mask", "pixel_values", "image_grid_thw", "pixel_values_videos", "video_grid_thw")
    # Without a mask the reference takes every token 0 for padding.
    inputs = {"attention_mask": np.ones_like(inputs["input_ids"]), **inputs}
    given = to_torch({name: inputs[name] for name in names if name in inputs})
    with torch.no_grad():
        out = model.generate(**given, max_new_tokens=new, do_sample=False, pad_token_id=0, eos_token_id=None)
    return out.numpy()[0, inputs["input_ids"].shape[1] :].tolist()


def ask(picture, text):
    return [{"role": "user", "content": [{"type": "image", "image": picture}, {"type": "text", "text": text}]}]


class Ready:
    """A queue of sequences that never have to be waited for; see `scheduler.RequestQueue`."""

    def __init__(self, answers):
        self.answers = list(answers)

    @property
    def is_empty(self):
        return not self.answers

    def fill(self):
        pass

    def ready(self):
        return self.answers

    def take(self, *, wait):
        return self.answers.pop(0) if self.answers else None


def script(monkeypatch, tokenizer):
    """Have sequences say what is put into the list that this returns, in the place of a model."""
    from glm4v_jax.generate.sequence import SequenceState

    take, texts = SequenceState.take, []

    def say(self, tokens, done, logprobs=()):
        del tokens, done, logprobs
        if hasattr(self, "rest"):
            return take(self, self.rest, True)
        said = tokenizer.encode(texts.pop(0))
        self.rest = [*said[5:], self.config.eos_token_id[0]]
        return take(self, said[:5], False)

    monkeypatch.setattr(SequenceState, "take", say)
    return texts
