"""The sides of `bench.ocr`: a page's prompt and its tokens, here and by transformers 5.24.

    python -m bench.ocr_sides --side ours --variant int8 --threads 2

Nothing but NumPy and `rich` is imported before a side is chosen: transformers 5.24 has an environment of its own,
without JAX.
"""

import functools
import time
from typing import Any

import numpy as np

from bench import turns

STEPS = 4
"""Decode steps of a dispatch of `Ours.steps`."""


def read_page(path: str) -> dict[str, np.ndarray]:
    """The processor's output that both sides are given: `bench.ocr.write_page`."""
    with np.load(path) as arrays:
        return dict(arrays)


class Ours(turns.JaxSide):
    """The package's own side, with weights in float32 or int8."""

    def __init__(self, variant: str):
        self._scheme = None if variant == "float32" else variant

    def load(self, directory: str, page: str, new_tokens: int) -> dict[str, Any]:
        """Load the checkpoint; `new_tokens` are the most that will follow the page."""
        import jax

        from glm4v_jax.checkpoints.load import load_runtime
        from glm4v_jax.checkpoints.plan import device_bytes
        from glm4v_jax.inputs.prompt import prompts_of

        begun = time.perf_counter()
        self._runtime = load_runtime(directory, dtype="float32", quantize=self._scheme)
        (self._prompt,) = prompts_of(read_page(page), self._runtime.config)
        self._new_tokens = new_tokens
        self._slots: Any = None
        weights = device_bytes(jax.tree.leaves(self._runtime.module))
        return {"seconds": time.perf_counter() - begun, "weights": weights}

    def page(self) -> dict[str, float]:
        """Seconds from pixels to the first new token, without compiling; what compiling took, or reading from disk."""
        from glm4v_jax.config.generation import GenerationConfig
        from glm4v_jax.devices.compilation_cache import compile_times
        from glm4v_jax.generate.prefill_chunks import Start
        from glm4v_jax.generate.slots import Slots

        begun = time.perf_counter()
        with compile_times() as compiled:
            self._slots = Slots(self._runtime)
            start = Start(self._prompt, GenerationConfig(eos_token_id=()), self._new_tokens)
            self._tokens = np.asarray(self._slots.start({0: start}).tokens).tolist()
        return {"seconds": time.perf_counter() - begun - sum(compiled), "compile": sum(compiled)}

    def decode(self, tokens: int) -> dict[str, float]:
        """Seconds for each of the next tokens."""
        from glm4v_jax.devices.compilation_cache import compile_times

        assert self._slots is not None
        begun = time.perf_counter()
        with compile_times() as compiled:
            chosen, counts, _ = self._slots.read(self._slots.decode(tokens))
        assert counts.tolist() == [tokens]
        self._tokens += chosen.tokens[0, :tokens].tolist()
        return {"decode": (time.perf_counter() - begun - sum(compiled)) / tokens}

    def answer(self) -> list[int]:
        """All tokens since the page."""
        return self._tokens

    def cache_bytes(self) -> int:
        """Keys and values that the next token reads."""
        text = self._runtime.config.text_config
        assert text.num_key_value_heads is not None and text.head_dim is not None
        slots = len(self._prompt) + len(self._tokens)
        return 8 * slots * text.num_hidden_layers * text.num_key_value_heads * text.head_dim

    def decode_bytes(self) -> int:
        """Weights of the decoder and the head, each read once for a token."""
        import jax

        from glm4v_jax.checkpoints.plan import device_bytes

        parts = [self._runtime.text.module.layers, None if self._runtime.head is None else self._runtime.head.module]
        return device_bytes(jax.tree.leaves(parts))

    def bandwidth(self, megabytes: int, threads: int) -> dict[str, float]:
        """See `turns.read_bandwidth`."""
        return {"numpy": turns.read_bandwidth(megabytes, threads)}

    def free(self) -> None:
        """Forget the page, to make room for `steps`."""
        self._slots = None

    def steps(self, tokens: int, mtp: bool = False) -> dict[str, float]:
        """Seconds of a decode step of some tokens after the page, head included: two are one and a draft to verify.

        `mtp`: of an MTP layer instead of the decoder: such a layer, and before it the projection that joins the last
        hidden state with the token's embedding.
        """
        import jax

        from glm4v_jax.model.kv_cache import init_cache

        text, join = self._mtp if mtp else (self._runtime.text, None)
        with self._runtime.on_mesh():
            cache = init_cache(text.module.config, 1, len(self._prompt) + self._new_tokens, "float32", stacked=False)
            cache = cache._replace(segments=cache.segments + 1, length=cache.length + len(self._prompt))
            ids = np.ones((1, tokens), np.int32)
            jax.block_until_ready(cache)
            begun = time.perf_counter()
            jax.block_until_ready(_run_steps(text, self._runtime.head, join, ids, cache))
        return {"step": (time.perf_counter() - begun) / STEPS}

    @functools.cached_property
    def _mtp(self) -> tuple[Any, Any]:
        """A decoder of one layer, and a projection of two embeddings to one."""
        import dataclasses

        import jax
        import jax.numpy as jnp
        from flax import nnx

        from glm4v_jax.model.layers import Layers
        from glm4v_jax.model.nn import Init, Linear
        from glm4v_jax.model.quantize import QuantConfig, quantize_kernel
        from glm4v_jax.model.runtime import Flat

        decoder = jax.tree.map(lambda x: x, self._runtime.text.module)
        first = getattr(decoder.layers, "0")
        decoder.layers, decoder.config = Layers(1), dataclasses.replace(decoder.config, num_hidden_layers=1)
        setattr(decoder.layers, "0", first)
        width = decoder.config.hidden_size
        with self._runtime.on_mesh():
            join = Linear({None: 2 * width}, {"embed": width}, Init(nnx.Rngs(params=0), dtype=jnp.float32))
            if self._scheme is not None:
                quantized = quantize_kernel(join.kernel[...], (None,), ("embed",), QuantConfig(self._scheme))  # type: ignore[arg-type]
                join.kernel, join.kernel_scale = map(nnx.Param, quantized)
        return Flat.of(decoder), Flat.of(join)


def _run_steps(text: Any, head: Any, join: Any, ids: Any, cache: Any) -> tuple[Any, Any]:
    """`STEPS` steps, each of the tokens that the one before chose, over the same slots of the cache."""
    import jax
    import jax.numpy as jnp

    from glm4v_jax.model.glm4v import score

    global _compiled_steps
    if _compiled_steps is None:

        def run(text: Any, head: Any, join: Any, ids: Any, cache: Any) -> tuple[Any, Any]:
            decoder, scorer = text.module, None if head is None else head.module

            def step(_: Any, carry: tuple[Any, Any]) -> tuple[Any, Any]:
                ids, cache = carry
                embeds = decoder.embed_tokens(ids)
                if join is not None:
                    embeds = join.module(jnp.concatenate([embeds, embeds], axis=-1))
                positions = jnp.broadcast_to(cache.length[None, :, None] + jnp.arange(ids.shape[1]), (3, *ids.shape))
                hidden, written, _ = decoder(embeds, positions, jnp.ones_like(ids), cache)
                chosen = jnp.argmax(score(decoder, scorer, hidden), axis=-1).astype(jnp.int32)
                return chosen, written._replace(length=cache.length)

            return jax.lax.fori_loop(0, STEPS, step, (ids, cache))

        _compiled_steps = jax.jit(run, donate_argnums=4)
    return _compiled_steps(text, head, join, ids, cache)


_compiled_steps: Any = None


class Theirs(turns.TorchSide):
    """transformers 5.24 with scaled dot-product attention, in float32 or bfloat16."""

    def __init__(self, variant: str):
        self._dtype = variant

    def load(self, directory: str, page: str, new_tokens: int) -> dict[str, Any]:
        """Load the checkpoint."""
        import torch

        from tests.helpers_transformers import define_torchvision_operators

        define_torchvision_operators()
        import transformers

        begun = time.perf_counter()
        transformers.logging.set_verbosity_error()
        made: Any = transformers  # other versions lack this class
        self._model = made.GlmOcrForConditionalGeneration.from_pretrained(
            directory, dtype=getattr(torch, self._dtype), attn_implementation="sdpa"
        ).eval()
        inputs = {name: torch.from_numpy(array) for name, array in read_page(page).items()}
        is_image = inputs["input_ids"] == self._model.config.image_token_id
        self._inputs = inputs | {"mm_token_type_ids": is_image.int()}
        weights = sum(one.nbytes for one in self._model.parameters())
        return {"seconds": time.perf_counter() - begun, "weights": weights}

    def page(self) -> dict[str, float]:
        """Seconds of a forward pass of the whole prompt: to its first new token, with nothing around it."""
        import torch

        begun = time.perf_counter()
        with torch.inference_mode():
            self._out = self._model(**self._inputs, use_cache=True, logits_to_keep=1)
            self._tokens = [int(self._out.logits[0, -1].argmax())]
        return {"seconds": time.perf_counter() - begun, "compile": 0.0}

    def decode(self, tokens: int) -> dict[str, float]:
        """Seconds for each of the next tokens, by forward passes with nothing around them."""
        import torch

        begun = time.perf_counter()
        with torch.inference_mode():
            for _ in range(tokens):
                ids = torch.tensor([self._tokens[-1:]])
                self._out = self._model(input_ids=ids, cache=self._out.cache, use_cache=True)
                self._tokens.append(int(self._out.logits[0, -1].argmax()))
        return {"decode": (time.perf_counter() - begun) / tokens}

    def answer(self) -> list[int]:
        """All tokens since the page."""
        return self._tokens


if __name__ == "__main__":
    turns.main(Ours, Theirs, "variant")  # of the weights: float32, int8 or bfloat16
