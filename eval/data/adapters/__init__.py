"""Readers of rows, by name: our own rows, and those of public data sets in the files in which they are published."""

from collections.abc import Callable, Iterator, Mapping

from eval.data import rows
from eval.data.adapters import chartqa, docvqa, mathvista, mmmu, ocrbench, refcoco, screenspot, textvqa, videomme
from eval.data.fields import Row
from eval.data.questions import Origin, Question

Reader = Callable[[Row, Origin], Iterator[Question]]
"""(row, where it stands) -> its questions; raises `DataError` that names the field, but not the place."""

READERS: Mapping[str, Reader] = {
    "rows": rows.read,
    "chartqa": chartqa.read,
    "docvqa": docvqa.read,
    "mathvista": mathvista.read,
    "mmmu": mmmu.read,
    "ocrbench": ocrbench.read,
    "refcoco": refcoco.read,
    "screenspot": screenspot.read,
    "textvqa": textvqa.read,
    "videomme": videomme.read,
}
