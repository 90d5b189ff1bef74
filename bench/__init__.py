"""Measurements, each one command: `python -m bench.NAME`; results go to `bench/results/` as JSON."""
