"""Trackers of a job's metrics, beside its files: TensorBoard, Weights & Biases and Trackio, each by its own library."""

import contextlib
import dataclasses
import importlib.util
import json
import os
import sys
import uuid
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from glm4v_jax.devices.distributed import is_first
from glm4v_jax.errors import ConfigError, one_line
from glm4v_jax.files import replacing, to_json
from train.config import TrackerName, TrainConfig

TENSORBOARD, RUN_ID = "tensorboard", "run_id"
"""What trackers keep in the output directory; the latter names the run, which a job that resumes continues."""

_PROJECT = "glm4v_jax"


class Tracker(Protocol):
    """What a tracker does; the names are those of Weights & Biases, which Trackio has, too."""

    def log(self, values: Mapping[str, float], *, step: int) -> Any:
        """Take the metrics of a step."""

    def finish(self) -> Any:
        """Write what is left, and close."""


class Trackers:
    """The trackers of a job, in the first process.

    One that fails, because there is no network for instance, is named in the log and not used any more; the training
    continues.
    """

    def __init__(self, config: TrainConfig, directory: Path, step: int, log: Callable[[str], None]):
        """Start those of a job, after `step`, the last that counts: TensorBoard hides what earlier runs have after it.

        `log` is called with one line for each that fails.
        """
        self._log, self._running = log, dict[TrackerName, Tracker]()
        for name in config.tracked if is_first() else ():
            with self._attempting(name):
                self._running[name] = TRACKERS[name].start(config, directory, step)

    def write(self, group: str, line: Mapping[str, Any]) -> None:
        """Write the numbers of a line of metrics, `group/name` each; those that are None or no numbers are passed over."""  # noqa: E501
        values = {f"{group}/{key}": float(value) for key, value in line.items() if isinstance(value, int | float)}
        step = int(values.pop(f"{group}/step"))
        for name, tracker in list(self._running.items()):
            with self._attempting(name):
                tracker.log(values, step=step)

    def close(self) -> None:
        """Close them."""
        for name, tracker in list(self._running.items()):
            with self._attempting(name):
                tracker.finish()

    @contextlib.contextmanager
    def _attempting(self, name: TrackerName) -> Any:
        try:
            with contextlib.redirect_stdout(sys.stderr):  # Trackio prints where its results are
                yield
        except Exception as error:  # of a network, a login or a disk
            self._running.pop(name, None)
            self._log(f"{name}: {one_line(error)}: further metrics are in the files of the job alone")


def check_trackers(config: TrainConfig) -> None:
    """Check that the libraries of a job's trackers are installed, before anything is loaded.

    Raises:
      ConfigError: one is not.
    """
    for name in config.tracked:
        package, extra, _ = TRACKERS[name]
        found = importlib.util.find_spec(package)
        # A directory such as wandb/, of the files of earlier runs, counts as a package without a file.
        if found is None or (found.origin is None and found.submodule_search_locations is not None):
            raise ConfigError(
                f"trackers: found {name!r} without the package {package}; expected both: "
                f"pip install 'glm4v_jax[{extra}]'"
            )


class _Board:
    """TensorBoard's files."""

    def __init__(self, config: TrainConfig, directory: Path, step: int):
        from tensorboardX import SummaryWriter

        del config
        self._writer = SummaryWriter(str(directory / TENSORBOARD), purge_step=step + 1)

    def log(self, values: Mapping[str, float], *, step: int) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def finish(self) -> None:
        try:
            self._writer.close()
        except OSError:  # a full disk; the writer would close its files again, and wait, at the end of Python
            for writer in self._writer.all_writers.values():
                events = writer.event_writer
                if events._worker.is_alive():
                    events._worker.stop()
                events._closed = True
            raise


def _wandb(config: TrainConfig, directory: Path, step: int) -> Tracker:
    import wandb

    del step  # it drops the metrics of steps that it has
    return wandb.init(
        project=os.environ.get("WANDB_PROJECT", _PROJECT), name=os.environ.get("WANDB_NAME", directory.name),
        id=_run_id(directory), resume="allow", dir=str(directory), config=_fields(config),
        mode=os.environ.get("WANDB_MODE", "offline"), settings={"console": "off"},
    )  # fmt: skip


def _trackio(config: TrainConfig, directory: Path, step: int) -> Tracker:
    import trackio

    del step
    name = f"{directory.name}-{_run_id(directory)}"
    return trackio.init(project=_PROJECT, name=name, resume="allow", config=_fields(config))


class _Kind(NamedTuple):
    """A tracker: the package that it needs, the extra that brings it, and what starts it."""

    package: str
    extra: str
    start: Callable[[TrainConfig, Path, int], Tracker]


TRACKERS: Mapping[TrackerName, _Kind] = {
    "tensorboard": _Kind("tensorboardX", "train", _Board),
    "wandb": _Kind("wandb", "wandb", _wandb),
    "trackio": _Kind("trackio", "trackio", _trackio),
}


def _run_id(directory: Path) -> str:
    path = directory / RUN_ID
    if not path.exists():
        with replacing(path) as aside:
            aside.write_text(uuid.uuid4().hex[:8], encoding="utf-8")
    return path.read_text(encoding="utf-8")


def _fields(config: TrainConfig) -> dict[str, Any]:
    return json.loads(to_json(dataclasses.asdict(config)))
