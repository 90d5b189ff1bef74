"""What `/metrics` shows: the names of vLLM with the prefix `glm4v:`."""

import bisect
import itertools
import time
from collections.abc import Callable, Iterator

import prometheus_client
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric

CONTENT_TYPE = prometheus_client.CONTENT_TYPE_LATEST

_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0)
_TOKEN_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0)

_REFUSALS = {
    400: "invalid", 401: "key", 404: "not_found", 408: "slow", 413: "too_large", 415: "invalid", 421: "host",
    429: "queue_full", 500: "error", 503: "not_ready", 504: "timeout",
}  # fmt: skip
"""Status -> what it is counted as."""

Reading = tuple[str, str, Callable[[], float], type[Metric]]
"""A name, what it is, where it is read, and its kind."""


def gauge(name: str, text: str, read: Callable[[], float]) -> Reading:
    """A number that is read when it is asked for."""
    return name, text, read, GaugeMetricFamily


def count(name: str, text: str, read: Callable[[], float]) -> Reading:
    """A number that only grows, and is read when it is asked for: what it has grown by since now.

    >>> metrics, total = Metrics("tiny"), [18704]
    >>> metrics.add_readings([count("prefix_cache_queries", "Prompt tokens.", lambda: total[0])])
    >>> total[0] += 12
    >>> metrics.text().decode().splitlines()[-1]
    'glm4v:prefix_cache_queries_total{model_name="tiny"} 12.0'
    """
    before = read()
    return name, text, lambda: read() - before, CounterMetricFamily


class Metrics:
    """The numbers of one server, in a registry of their own.

    >>> metrics = Metrics("tiny")
    >>> metrics.add_readings([gauge("num_requests_running", "Sequences in slots.", lambda: 2)])
    >>> metrics.ended("stop", seconds=0.5, tokens=8)
    >>> lines = metrics.text().decode().splitlines()
    >>> [line for line in lines if line.startswith(("glm4v:num_", "glm4v:generation_tokens_total"))]
    ['glm4v:generation_tokens_total{model_name="tiny"} 8.0', 'glm4v:num_requests_running{model_name="tiny"} 2.0']
    """

    def __init__(self, model: str):
        """`model`: its name, a label of all numbers."""
        self._registry = prometheus_client.CollectorRegistry()
        self._model = model

        def counter(name: str, text: str, *labels: str) -> prometheus_client.Counter:
            return prometheus_client.Counter(f"glm4v:{name}", text, ("model_name", *labels), registry=self._registry)

        def seconds(name: str, text: str, bounds: tuple[float, ...] = _SECONDS) -> _Histogram:
            made = _Histogram(f"glm4v:{name}_seconds", text, bounds, model)
            self._registry.register(made)
            return made

        self._ended = counter("request_success", "Choices that ended, by their finish reason.", "finished_reason")
        self._refused = counter("requests_refused", "Requests that were refused or failed.", "reason")
        self._prompt_tokens = counter("prompt_tokens", "Tokens of prompts.").labels(model)
        self._new_tokens = counter("generation_tokens", "Generated tokens.").labels(model)
        self._first = seconds("time_to_first_token", "From the arrival of a request to its first token.")
        self._between = seconds(
            "inter_token_latency",
            "Between tokens. Those of one dispatch count as evenly spread over the time since the one before.",
            _TOKEN_SECONDS,
        )
        self._whole = seconds("e2e_request_latency", "From the arrival of a request to its last token.")

    def add_readings(self, readings: list[Reading]) -> None:
        """Add numbers that somebody else counts."""
        self._registry.register(_Readings(readings, self._model))

    def began(self, prompt_tokens: int) -> None:
        """Count the prompt of a request that is accepted."""
        self._prompt_tokens.inc(prompt_tokens)

    def first_token(self, seconds: float) -> None:
        """Note the time until the first tokens of a choice."""
        self._first.observe(seconds)

    def more_tokens(self, seconds: float, tokens: int) -> None:
        """Note the time between two updates of a choice, the second with `tokens` tokens."""
        self._between.observe(seconds / tokens, tokens)

    def ended(self, finish_reason: str, *, seconds: float, tokens: int) -> None:
        """Count a choice that has ended."""
        self._ended.labels(self._model, finish_reason).inc()
        self._new_tokens.inc(tokens)
        self._whole.observe(seconds)

    def answered(self, status: int) -> None:
        """Count a response, if it is an error."""
        if status in _REFUSALS:
            self._refused.labels(self._model, _REFUSALS[status]).inc()

    def text(self) -> bytes:
        """All numbers, as Prometheus reads them."""
        return prometheus_client.generate_latest(self._registry)


class _Histogram:
    """Counts in buckets, shown as `prometheus_client.Histogram` does, which takes tokens of a dispatch one by one."""

    def __init__(self, name: str, text: str, bounds: tuple[float, ...], model: str):
        self._name, self._text, self._bounds, self._model = name, text, bounds, model
        self._counts, self._sum, self._created = [0] * (len(bounds) + 1), 0.0, time.time()

    def observe(self, value: float, times: int = 1) -> None:
        self._counts[bisect.bisect_left(self._bounds, value)] += times
        self._sum += times * value

    def collect(self) -> Iterator[Metric]:
        metric = HistogramMetricFamily(self._name, self._text, labels=["model_name"])
        bounds = [*map(str, self._bounds), "+Inf"]
        counts = itertools.accumulate(self._counts)
        metric.add_metric([self._model], list(zip(bounds, counts, strict=True)), self._sum)
        metric.add_sample(f"{self._name}_created", {"model_name": self._model}, self._created)
        yield metric


class _Readings:
    def __init__(self, readings: list[Reading], model: str):
        self._readings, self._model = readings, model

    def collect(self) -> Iterator[Metric]:
        for name, text, read, family in self._readings:
            metric = family(f"glm4v:{name}", text, labels=["model_name"])  # type: ignore[call-arg]
            metric.add_metric([self._model], read())  # type: ignore[attr-defined]
            yield metric
