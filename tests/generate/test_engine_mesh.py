"""The engine on eight simulated devices: slots split over the data axes give what one device gives."""

import jax.numpy as jnp
from helpers_generation import GREEDY, Ready, random_requests

MESH = dict(fsdp=2, kv=2, q=2)


def keep_even(tokens, scores):
    """Drop what has the parity of the newest token."""
    return jnp.where(jnp.arange(scores.shape[1]) % 2 == tokens[:, -1:] % 2, -jnp.inf, scores)


def answers(engine):
    """Tokens of prompts of all modalities through slots, of a conversation's second turn, with lookup, and of beams.

    Some through slots with an int8 cache, some chunk by chunk between dispatches, with keys of each other.
    """
    from glm4v_jax.generate.engine import Engine, Request
    from glm4v_jax.generate.scheduler import run
    from glm4v_jax.hf.generate import generate

    prompts = [inputs for inputs in random_requests(engine.model, 20, 3) if 64 < inputs["input_ids"].size <= 96]
    requests = [Request(inputs, dict(max_new_tokens=3 + 2 * i)) for i, inputs in enumerate(prompts)]
    assert len(requests) >= 8 and {"pixel_values", "pixel_values_videos"} <= {name for one in prompts for name in one}
    found = {one.index: list(one.tokens) for one in engine.generate_many(requests, **GREEDY)}
    # A batch of rows with and without constraints and grammars, on shards of the vocabulary.
    options = [
        {}, dict(no_repeat_ngram_size=2, suppress_tokens=[*range(0, 832, 3)]), dict(sequence_bias={(9, 9): 4.0}),
        dict(regex="[a-z]{3,5}(, [0-9]{2}){4}"),
    ]  # fmt: skip
    some = [Request(inputs, dict(options[i % 4], max_new_tokens=9)) for i, inputs in enumerate(prompts)]
    again = engine.generate_many(some, logprobs=0, logits_processor=keep_even, **GREEDY)
    constrained = {one.index: [entry.token for entry in one.logprobs] for one in again}
    talk = engine.conversation(max_new_tokens=5, **GREEDY)
    talk.send("Hello")
    # A penalty below 1 makes a random model repeat what it has read.
    repeating = dict(repetition_penalty=0.01, prompt_lookup_num_tokens=4)
    copied = {one.index: list(one.tokens) for one in engine.generate_many(requests[:6], **GREEDY | repeating)}
    beams = generate(
        engine.runtime, **prompts[0], max_new_tokens=5, num_beams=3, num_return_sequences=3, no_repeat_ngram_size=2,
        do_sample=False, eos_token_id=-1,
    )  # fmt: skip
    own = Engine(engine.model, engine.processor, num_slots=4, capacity=256, cache_dtype="int8")
    rounded = {one.index: list(one.tokens) for one in own.generate_many(requests[:6], **GREEDY)}
    reused = own.stats.reused_tokens
    config = own.config(max_new_tokens=6, **GREEDY)
    joined = [own.new_sequence(own.prompt(inputs), config) for inputs in (*prompts[:4], *prompts[:4])]
    with own.lend_slots(own.num_slots, config, chunk=32) as slots:
        list(run(slots, Ready(joined), interleave=True))
    assert own.stats.reused_tokens > reused and joined[0].tokens == joined[4].tokens
    return [
        *(one.tokens for one in joined),
        *(rounded[i] for i in range(6)),
        *(found[i] for i in range(len(requests))),
        *(constrained[i] for i in range(len(some))),
        list(talk.send("Again").tokens),
        *(copied[i] for i in range(6)),
        *beams.tolist(),
    ]


def test_a_mesh_gives_the_same_tokens(engine, run_on_devices):
    assert run_on_devices(answers_on_mesh) == answers(engine)


def answers_on_mesh():
    """See `answers`; on `MESH`."""
    from helpers_checkpoints import RANDOM_CHECKPOINT

    from glm4v_jax.devices.mesh import make_mesh
    from glm4v_jax.generate.engine import Engine

    # As on every platform but a CPU; commands have layers one by one on a mesh (`tests/cli/test_mesh.py`).
    one = Engine.from_pretrained(RANDOM_CHECKPOINT, mesh=make_mesh(**MESH), stacked=True)
    return answers(Engine(one.model, one.processor, num_slots=4, capacity=256))
