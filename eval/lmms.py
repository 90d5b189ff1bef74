"""Our engine under lmms-eval: `lmms_eval --model glm4v_jax --model_args pretrained=DIR --tasks ...`.

lmms-eval (0.7) finds `manifest` by the entry point group `lmms_eval.models`; it is installed separately, since it
depends on torch and much else. Nothing in this package imports this module.
"""

import logging
from collections.abc import Sequence
from typing import Any

from lmms_eval.api.instance import GenerationResult, Instance, TokenCounts
from lmms_eval.api.model import lmms
from lmms_eval.models.registry_v2 import ModelManifest

from eval.parse_answer import final_answer
from glm4v_jax.config.checks import CacheDtype, did_you_mean, one_of
from glm4v_jax.config.presets import PRESETS
from glm4v_jax.errors import ConfigError, GenerationError
from glm4v_jax.generate.completion import Completion
from glm4v_jax.generate.engine import Engine, Request
from glm4v_jax.tiny import TINY_CHECKPOINT

_FORMS = ("boxed", "answer", "raw")
# Generation options of lmms-eval's tasks: those that are used, and those that have no meaning here.
_USED = ("temperature", "top_p", "top_k", "do_sample", "min_p", "repetition_penalty")
_IGNORED = (
    "max_new_tokens", "max_gen_toks", "until", "stop_sequences", "num_beams", "image_aspect_ratio", "use_cache",
    "return_dict_in_generate",
)  # fmt: skip
_BUDGETS = {name: PRESETS["bench"].options[name] for name in ("max_new_tokens", "think_budget", "answer_budget")}

_LOG = logging.getLogger(__name__)


def manifest() -> ModelManifest:
    """Describe this model to lmms-eval."""
    return ModelManifest(model_id="glm4v_jax", chat_class_path="eval.lmms.Glm4vJax")


class Glm4vJax(lmms):  # type: ignore[misc]
    """GLM-4.1V in JAX; all requests of a call go through the engine's slots together."""

    is_simple = False

    def __init__(
        self,
        pretrained: str = str(TINY_CHECKPOINT),
        *,
        adapter: str | None = None,
        dtype: str | None = None,
        quantize: str | None = None,
        cache_dtype: CacheDtype = "auto",
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
          adapter, dtype, quantize, cache_dtype, mesh, slots: as `glm4v eval` takes them.
          preset: replaces the sampling options of tasks.
          system: the system message.
          max_new_tokens, think_budget, answer_budget: over those of the published benchmarks, 8192 tokens each; the
            tasks' own leave no room to think, and are ignored.
          answer: what the tasks score: "boxed", what is in the answer's box, or the answer where there is no box;
            "answer", the answer without the thought; "raw", the whole text, with stop strings ignored.
          batch_size, device: passed by lmms-eval and ignored; `slots` and JAX decide.

        Raises:
          Glm4vError: the model cannot be loaded, or an option is invalid.
        """
        super().__init__()
        del batch_size, device
        if answer not in _FORMS:
            raise ConfigError(f"answer: found {answer!r}; expected {one_of(_FORMS, answer)}")
        from glm4v_jax.config.model import Glm4vConfig
        from glm4v_jax.planning.mesh_presets import mesh_for

        on = (
            None if mesh is None else mesh_for(mesh, Glm4vConfig.from_pretrained(pretrained), scheme=quantize or "none")
        )
        self._engine = Engine.from_pretrained(
            pretrained, num_slots=int(slots), adapter=adapter, dtype=dtype, quantize=quantize, cache_dtype=cache_dtype,
            mesh=on,
        )  # fmt: skip
        self._form, self._preset, self._system = answer, preset, system
        given = {"max_new_tokens": max_new_tokens, "think_budget": think_budget, "answer_budget": answer_budget}
        budgets = {} if preset is not None or (max_new_tokens is not None and think_budget is None) else _BUDGETS
        self._over = {**budgets, **{name: value for name, value in given.items() if value is not None}}
        self._engine.config(preset, **self._over)  # fails now, not after the data are loaded

    def generate_until(self, requests: Sequence[Instance]) -> list[GenerationResult]:
        """Answer all requests, in their order; one that fails is empty, and logged."""
        results: dict[int, GenerationResult] = {}
        checked = [_options(request.args[2]) for request in requests]
        prompts = (self._request(request.args, options) for request, options in zip(requests, checked, strict=True))
        unfinished = 0
        for completion in self._engine.generate_many(prompts, preset=self._preset, skip_errors=True):
            context, _, options, *_ = requests[completion.index].args
            if completion.error is not None:
                _LOG.warning("request %d failed: %s", completion.index, completion.error)
            unfinished += completion.finish_reason == "length" and not completion.answer
            text = self._text(completion, options)
            counts = TokenCounts(input_tokens=completion.prompt_tokens, output_tokens=len(completion.tokens))
            results[completion.index] = GenerationResult(text, counts)
            self.cache_hook.add_partial("generate_until", (context, options), text)
        if unfinished:
            _LOG.warning(
                "%d of %d answers ended within their thought: max_new_tokens is too low", unfinished, len(results)
            )
        return [results[number] for number in range(len(requests))]

    def generate_until_multi_round(self, requests: Sequence[Instance]) -> list[str]:
        """Not supported."""
        raise NotImplementedError("glm4v_jax: found a task of several rounds; expected one that generates once")

    def loglikelihood(self, requests: Sequence[Instance]) -> list[tuple[float, bool]]:
        """Not supported."""
        raise NotImplementedError("glm4v_jax: found a task scored by likelihood; expected one that generates")

    def _request(self, arguments: Sequence[Any], options: dict[str, Any]) -> Request:
        _, to_messages, _, number, task, split = arguments
        messages = [_message(message) for message in to_messages(self.task_dict[task][split][number])]
        if self._system is not None and messages[0]["role"] != "system":
            messages.insert(0, {"role": "system", "content": [{"type": "text", "text": self._system}]})
        return Request(messages, {**({} if self._preset else options), **self._over})

    def _text(self, completion: Completion, options: dict[str, Any]) -> str:
        """The text that is scored; a task's stop strings end an answer, and not the thought before it."""
        if self._form == "raw":
            return completion.text
        text = completion.answer if self._form == "answer" else final_answer(completion.text) or ""
        until = options.get("until") or ()
        for stop in [until] if isinstance(until, str) else until:
            text = text.strip().split(stop)[0] if stop else text
        return text.strip()


def _message(message: dict[str, Any]) -> dict[str, Any]:
    """Convert a message of lmms-eval, where images and videos are in `url` whatever they are."""
    content = []
    for item in message["content"]:
        kind = item["type"]
        if kind not in ("text", "image", "video"):
            raise GenerationError(f"content: found the type {kind!r}; expected text, image or video")
        content.append({"type": "text", "text": item["text"]} if kind == "text" else {"type": kind, kind: item["url"]})
    return {"role": message["role"], "content": content}


def _options(options: dict[str, Any]) -> dict[str, Any]:
    """Convert a task's options to fields of `GenerationConfig`; GenerationError if there is an unknown one."""
    if unknown := sorted(set(options) - {*_USED, *_IGNORED}):
        near = did_you_mean(unknown[0], _USED)
        raise GenerationError(f"generation_kwargs: found {unknown[0]!r}; expected some of {', '.join(_USED)}{near}")
    if options.get("num_beams") not in (None, 1):
        raise GenerationError(f"num_beams: found {options['num_beams']}; expected 1")
    taken = {name: options[name] for name in _USED if options.get(name) is not None}
    if not taken.get("temperature", 1.0):  # 0 means greedy
        for name in ("temperature", "top_p", "top_k", "min_p"):
            taken.pop(name, None)
        taken["do_sample"] = False
    return taken
