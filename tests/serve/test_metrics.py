"""Histograms against those of `prometheus_client`."""

import prometheus_client

from glm4v_jax.serve.metrics import _TOKEN_SECONDS, Metrics


def test_histograms_are_prometheus_own():
    ours, registry = Metrics("tiny"), prometheus_client.CollectorRegistry()
    name = "glm4v:inter_token_latency_seconds"
    text = "Between tokens. Those of one dispatch count as evenly spread over the time since the one before."
    theirs = prometheus_client.Histogram(name, text, ("model_name",), registry=registry, buckets=_TOKEN_SECONDS)
    for seconds, tokens in ((0.25, 4), (0.004, 2), (0.005, 1), (5.0, 1), (64.0, 2)):  # exact in binary, and on bounds
        ours.more_tokens(seconds, tokens)
        for _ in range(tokens):
            theirs.labels("tiny").observe(seconds / tokens)
    found = [line for line in ours.text().decode().splitlines() if name.split("_seconds")[0] in line]
    expected = prometheus_client.generate_latest(registry).decode().splitlines()
    created = f'{name}_created{{model_name="tiny"}} '
    assert len(found) == len(expected) > 15
    for mine, own in zip(found, expected, strict=True):
        assert mine == own or (mine.startswith(created) and own.startswith(created))
