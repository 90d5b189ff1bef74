"""Our engine under lmms-eval: `lmms_eval --model glm4v_jax --model_args pretrained=DIR --tasks ...`.

lmms-eval (0.7) finds `manifest` by the entry point group `lmms_eval.models`; it is installed by itself, since it brings
torch and much else, and nothing here imports it before it imports this.
"""

from collections.abc import Sequence
from typing import Any

from lmms_eval.api.instance import GenerationResult, Instance, TokenCounts
from lmms_eval.api.model import lmms
from lmms_eval.models.registry_v2 import ModelManifest

from glm4v_jax.data import TINY_CHECKPOINT
from glm4v_jax.errors import ConfigError, GenerationError
from glm4v_jax.generate.completion import Completion
from glm4v_jax.generate.engine import Engine, Request

_FORMS = ("boxed", "answer", "raw")
# What lmms-eval's tasks say of generation, and what it is called here.
_TAKEN = ("max_new_tokens", "temperature", "top_p", "top_k", "do_sample", "min_p", "repetition_penalty")
_MEANINGLESS = ("until", "num_beams", "image_aspect_ratio", "use_cache", "return_dict_in_generate")


def manifest() -> ModelManifest:
    """What lmms-eval is to know of this model."""
    return ModelManifest(model_id="glm4v_jax", chat_class_path="eval.lmms.Glm4vJax")


class Glm4vJax(lmms):  # type: ignore[misc]
    """GLM-4.1V in JAX; all requests of a call go through the engine's slots together."""

    is_simple = False

    def __init__(
        self,
        pretrained: str = str(TINY_CHECKPOINT),
        *,
        dtype: str | None = None,
        mesh: str | None = None,
        slots: int = 8,
        preset: str | None = None,
        system: str | None = None,
        max_new_tokens: int | None = None,
        think_budget: int | None = None,
        answer_budget: int | None = None,
        answer: str = "boxed",
        batch_size: int | str | None = None,
        device: str | None = None,
    ):
        """Load the model; the arguments come from `--model_args`.

        Args:
          pretrained: directory of a checkpoint; the package's tiny model by default.
          dtype, mesh, slots, preset: as `glm4v eval` takes them.
          system: what the system says first.
          max_new_tokens, think_budget, answer_budget: over those of the tasks, most of which leave no room to think.
          answer: what the tasks score: "boxed", what is in the answer's box, or the answer where there is no box;
            "answer", the answer without the thought; "raw", the whole text.
          batch_size, device: lmms-eval gives them; `slots` and JAX decide.

        Raises:
          Glm4vError: what is wrong with the model or an option.
        """
        super().__init__()
        del batch_size, device
        if answer not in _FORMS:
            raise ConfigError(f"answer: found {answer!r}; expected one of {', '.join(_FORMS)}")
        from glm4v_jax.config import Glm4vConfig
        from glm4v_jax.mesh_presets import mesh_for

        on = None if mesh is None else mesh_for(mesh, Glm4vConfig.from_pretrained(pretrained))
        self._engine = Engine.from_pretrained(pretrained, num_slots=int(slots), dtype=dtype, mesh=on)
        self._form, self._preset, self._system = answer, preset, system
        given = {"max_new_tokens": max_new_tokens, "think_budget": think_budget, "answer_budget": answer_budget}
        self._over = {name: value for name, value in given.items() if value is not None}
        self._engine.config(preset, **self._over)  # complains now, not after the data are loaded

    def generate_until(self, requests: Sequence[Instance]) -> list[GenerationResult]:
        """Answer all requests, in their order."""
        found: list[GenerationResult | None] = [None] * len(requests)
        prompts = (self._request(*request.args) for request in requests)
        for completion in self._engine.generate_many(prompts, preset=self._preset):
            _, _, options, *_ = requests[completion.index].args
            counts = TokenCounts(input_tokens=completion.prompt_tokens, output_tokens=len(completion.tokens))
            found[completion.index] = GenerationResult(self._text(completion, options), counts)
        return [result for result in found if result is not None]

    def generate_until_multi_round(self, requests: Sequence[Instance]) -> list[str]:
        """Not there."""
        raise NotImplementedError("glm4v_jax: found a task of several rounds; expected one that generates once")

    def loglikelihood(self, requests: Sequence[Instance]) -> list[tuple[float, bool]]:
        """Not there."""
        raise NotImplementedError("glm4v_jax: found a task scored by likelihood; expected one that generates")

    def _request(
        self, context: str, to_messages: Any, options: dict[str, Any], number: int, task: str, split: str
    ) -> Request:
        messages = [_message(message) for message in to_messages(self.task_dict[task][split][number])]
        if self._system is not None and messages[0]["role"] != "system":
            messages.insert(0, {"role": "system", "content": [{"type": "text", "text": self._system}]})
        return Request(messages, {**_options(options), **self._over})

    def _text(self, completion: Completion, options: dict[str, Any]) -> str:
        """What is scored; a task's stop strings end it, and not the thought before it."""
        parsed = completion.parsed
        text = completion.text if self._form == "raw" else parsed.answer
        if self._form == "boxed" and len(parsed.boxed) == 1:
            text = parsed.boxed[0]
        until = options.get("until") or ()
        for stop in [until] if isinstance(until, str) else until:
            text = text.strip().split(stop)[0] if stop else text
        return text.strip()


def _message(message: dict[str, Any]) -> dict[str, Any]:
    """A message of lmms-eval's, whose pictures and videos are called `url` whatever they are."""
    content = []
    for item in message["content"]:
        kind = item["type"]
        if kind not in ("text", "image", "video"):
            raise GenerationError(f"content of type {kind!r}: expected text, image or video")
        content.append({"type": "text", "text": item["text"]} if kind == "text" else {"type": kind, kind: item["url"]})
    return {"role": message["role"], "content": content}


def _options(options: dict[str, Any]) -> dict[str, Any]:
    """A task's options as fields of `GenerationConfig`.

    Raises:
      GenerationError: there is one that is not known.
    """
    if unknown := sorted(set(options) - {*_TAKEN, *_MEANINGLESS}):
        raise GenerationError(f"generation_kwargs: found {unknown[0]!r}; expected some of {', '.join(_TAKEN)}")
    if options.get("num_beams") not in (None, 1):
        raise GenerationError(f"num_beams: found {options['num_beams']}; expected 1")
    taken = {name: options[name] for name in _TAKEN if options.get(name) is not None}
    if not taken.get("temperature", 1.0):  # 0 stands for the likeliest token
        for name in ("temperature", "top_p", "top_k", "min_p"):
            taken.pop(name, None)
        taken["do_sample"] = False
    return taken
