"""Programs compiled now beside the committed table: what has become worse, and by how much.

Two runs of the same versions of JAX and libtpu give the same figures but for estimated times, which differ by less than
0.01 %. The tolerances are above that, and below what a copied weight or one more exchange costs.
"""

import json
from collections.abc import Collection, Iterable
from typing import Any

FIGURES = {
    "arguments": (0.001, 0.001, "GiB"),
    "temporaries": (0.005, 0.002, "GiB"),
    "outputs": (0.001, 0.001, "GiB"),
    "peak": (0.005, 0.002, "GiB"),
    "received": (0.005, 0.001, "GB"),
    "estimated_ms": (0.01, 0.01, "ms"),
}
"""Figure of a line -> how much more of it is no change: as a fraction, and in its unit."""

Line = dict[str, Any]


def key(line: Line) -> tuple[str, str, str]:
    """What a line is of: program, slice, mesh."""
    return line["program"], line["topology"], json.dumps(line["mesh"])


def regressions(before: Iterable[Line], now: Iterable[Line]) -> list[str]:
    """List what is worse in lines of programs that both tables have, a sentence each.

    A figure that either line lacks, as those of earlier versions do, is not compared. More collectives of a kind, in
    the layer loop or elsewhere, and more copies are worse whatever they move.

    >>> line = {"program": "decode", "topology": "v5e:2x4", "mesh": {"kv": 2}, "collectives": {}, "copies": []}
    >>> regressions([line | {"temporaries": 0.006}], [line | {"temporaries": 0.3}])
    ['decode on v5e:2x4 kv=2: temporaries: found 0.3 GiB; expected at most 0.006, as in the table']
    """
    known = {key(line): line for line in before}
    return [
        f"{_title(line)}: {fault}, as in the table"
        for line in now
        if (was := known.get(key(line))) is not None
        for fault in _faults(was, line)
    ]


def missing(before: Iterable[Line], now: Iterable[Line], chosen: Collection[str] | None = None) -> list[str]:
    """List the programs of a table that are not compiled any more, or have another name, a sentence each.

    `chosen`: the cases that were compiled, where those were not all; lines of earlier versions do not say theirs.
    """
    known = {key(line) for line in now}
    return [
        f"{_title(line)}: found no such program; expected it, as in the table"
        for line in before
        if key(line) not in known and (chosen is None or line.get("case") in chosen)
    ]


def merged(before: Iterable[Line], now: Iterable[Line], chosen: Collection[str]) -> list[Line]:
    """Return the lines of a table with those of the chosen cases replaced."""
    known = {key(line): line for line in now}
    kept = [known.pop(key(line), line) for line in before if key(line) in known or line.get("case") not in chosen]
    return [*kept, *known.values()]


def _title(line: Line) -> str:
    mesh = " ".join(f"{axis}={size}" for axis, size in line["mesh"].items())
    return f"{line['program']} on {line['topology']} {mesh}".rstrip()


def _faults(was: Line, line: Line) -> Iterable[str]:
    for name, (share, unit, of) in FIGURES.items():
        old, new = was.get(name), line.get(name)
        if old is not None and new is not None and new > old * (1 + share) + unit:
            yield f"{name.removesuffix('_ms').replace('_', ' ')}: found {new:.4g} {of}; expected at most {old:.4g}"
    for kind in line["collectives"]:
        counts = zip(was["collectives"].get(kind, (0, 0)), line["collectives"][kind], strict=True)
        for where, (old, new) in zip(("in the layer loop", "elsewhere"), counts, strict=True):
            if new > old:
                yield f"{kind} {where}: found {new}; expected at most {old}"
    if len(line["copies"]) > len(was["copies"]):
        shapes = ", ".join(shape for shape, _ in line["copies"])
        yield f"copies: found {len(line['copies'])} ({shapes}); expected at most {len(was['copies'])}"
