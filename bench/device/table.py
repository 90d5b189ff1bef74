"""Figures beside their floors: pure arithmetic on what `bench.device` writes; no device is touched.

>>> work = Workload("decode", read=17.6e9, flops=2e10)
>>> round(floor(work, Rates(4.4e12, 8e14)) * 1e3, 3)
4.0
"""

from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

from bench import report
from glm4v_jax.devices.hardware import chip_of


class Aim(NamedTuple):
    """The least that a workload should reach: a fraction of a ceiling, or runs per second.

    of: "bandwidth" and "FLOP/s" are the published ones of the chip (the latter is MFU in training), "matmul" is the
      rate of matrix products that was measured on the device.
    chip: the kind of device that the aim is for; "" for all.
    """

    of: Literal["bandwidth", "FLOP/s", "matmul", "per second"]
    least: float
    chip: str = ""

    def __str__(self) -> str:
        if self.of == "per second":
            return f"{self.least:g}/s" + (f" on an {self.chip}" if self.chip else "")
        return f"{self.least:.0%} of {'the matmul rate' if self.of == 'matmul' else self.of}"


class Workload(NamedTuple):
    """A run, and the least it has to do.

    part: of `bench.device` that measures it.
    read: bytes that it reads from memory at least, and writes if it is a copy.
    flops: operations of its matrix products, padding and recomputation excluded.
    amount, unit: what it yields: 64 "tokens".
    aim: None where there is none.
    is_serial: reading and computing are done by programs that run one after the other.
    """

    part: str
    read: float
    flops: float
    amount: float = 1
    unit: str = ""
    aim: Aim | None = None
    is_serial: bool = False


class Rates(NamedTuple):
    """Ceilings of a device: bytes per second from memory, bfloat16 operations per second."""

    bandwidth: float
    flops: float


def floor(work: Workload, rates: Rates) -> float:
    """Return the least seconds that a run takes at these rates."""
    times = work.read / rates.bandwidth, work.flops / rates.flops
    return sum(times) if work.is_serial else max(times)


def published(kind: str) -> Rates | None:
    """Return the published rates of a kind of device; None where one is not known."""
    chip = chip_of(kind)
    return Rates(chip.bandwidth, chip.flops) if chip and chip.bandwidth and chip.flops else None


class Line(NamedTuple):
    """A workload that was measured, or not.

    floor: least seconds by the ceilings that were measured on the device; None without them.
    of_floor: that over the seconds it took; of_peak: the same by the chip's published rates.
    passed: whether the aim is met, or results are right; None where there is neither.
    """

    what: str
    work: Workload
    seconds: float | None
    floor: float | None
    of_floor: float | None
    of_peak: float | None
    passed: bool | None
    note: str


def workloads_of(results: Mapping[str, Any]) -> dict[str, Workload]:
    """Return the workloads as they were when these results were measured."""
    return {
        what: Workload(*fields)._replace(aim=None if aim is None else Aim(*aim))
        for what, fields in results["workloads"].items()
        for aim in (fields[Workload._fields.index("aim")],)
    }


def lines(results: Mapping[str, Any]) -> list[Line]:
    """Return a line for every workload, and for every figure without one."""
    works, figures = workloads_of(results), results["figures"]
    kind = results["machine"]["device"]
    measured = _measured(works, figures)
    others = {what: Workload(figure["part"], 0, 0) for what, figure in figures.items() if "operations" not in figure}
    return [_line(what, work, figures.get(what, {}), measured, kind) for what, work in (others | works).items()]


def _measured(works: Mapping[str, Workload], figures: Mapping[str, Any]) -> Rates | None:
    """The ceilings of the device, where they were measured."""

    def rate(what: str, amount: float) -> float:
        seconds = figures.get(what, {}).get("seconds")
        return amount / seconds if seconds else 0.0

    bandwidth = max(rate(what, works[what].read) for what in ("copy", "read"))
    flops = rate("matrix product, bfloat16", works["matrix product, bfloat16"].flops)
    return Rates(bandwidth, flops) if bandwidth and flops else None


def _line(what: str, work: Workload, figure: Mapping[str, Any], measured: Rates | None, kind: str) -> Line:
    seconds, passed = figure.get("seconds"), figure.get("passed")
    note = figure.get("error") or figure.get("note") or ""
    if figure.get("error"):
        passed = False
    has_floor = bool(work.read or work.flops) and work.part != "ceilings"
    least = floor(work, measured) if measured and has_floor else None
    if not seconds:
        return Line(what, work, None, least, None, None, passed, note)
    of_floor = None if least is None else least / seconds
    peak = published(kind)
    of_peak = floor(work, peak) / seconds if peak and (work.read or work.flops) else None
    if (reached := _reached(work, seconds, measured, peak, kind)) is not None:
        assert work.aim is not None
        passed = passed is not False and reached >= work.aim.least
    return Line(what, work, seconds, least, of_floor, of_peak, passed, note)


def _reached(work: Workload, seconds: float, measured: Rates | None, peak: Rates | None, kind: str) -> float | None:
    """What a run reached of what its aim counts; None without an aim for this device, or without its ceiling."""
    if work.aim is None or not kind.startswith(work.aim.chip):
        return None
    if work.aim.of == "per second":
        return work.amount / seconds
    rates = measured if work.aim.of == "matmul" else peak
    if rates is None:
        return None
    return (work.read / rates.bandwidth if work.aim.of == "bandwidth" else work.flops / rates.flops) / seconds


def tables(results: Mapping[str, Any]) -> list[report.Table]:
    """Return the lines that were measured or failed."""
    judge = not results["machine"]["tiny"]
    rows = [
        (
            line.what, _number(line.seconds, 1e3), _rate(line), _number(line.floor, 1e3), _percent(line.of_floor),
            _percent(line.of_peak), str(line.work.aim or "") if judge else "",
            "" if line.passed is None or not (judge or line.work.aim is None) else report.verdict(line.passed),
            line.note,
        )
        for line in lines(results) if line.seconds or line.note
    ]  # fmt: skip
    columns = ("workload", "ms", "rate", "floor, ms", "of it", "of published", "aim", "", "")
    return [report.Table(results["machine"]["device"], columns, rows)]


def _number(value: float | None, scale: float = 1) -> str:
    return "" if value is None else f"{value * scale:,.3g}" if value * scale < 100 else f"{value * scale:,.0f}"


def _percent(value: float | None) -> str:
    return "" if value is None else f"{value:.0%}"


def _rate(line: Line) -> str:
    """What a run yields per second."""
    if not line.seconds:
        return ""
    if line.work.unit:
        return f"{_number(line.work.amount / line.seconds)} {line.work.unit}/s"
    if line.work.flops:
        return f"{_number(line.work.flops / line.seconds / 1e12)} TFLOP/s"
    return f"{_number(line.work.read / line.seconds / 1e12)} TB/s" if line.work.read else ""
