"""Tables in HTML as trees, and the edit distance between two of them: what TEDS compares.

TEDS is 1 less the distance by the number of elements of the larger table (arXiv 1911.10683, PubTabNet). Nodes are all
elements but those inside a cell; inserting or deleting one costs 1, and so does exchanging one for another of a
different tag, colspan or rowspan. Cells that agree in these cost the relative Levenshtein distance of their contents,
whose units are characters, and tags such as `<b>`.
"""

import dataclasses
import functools
import unicodedata
from collections.abc import Iterator
from html.parser import HTMLParser

import numpy as np

_CELLS = ("td", "th")
_SECTIONS = ("thead", "tbody", "tfoot")
_VOID = ("br", "col", "hr", "img", "input", "wbr")
_CLOSED_BY = {"tr": ("tr",), **dict.fromkeys(_SECTIONS, ("tr", *_SECTIONS))}
"""Element -> the open ones that its start ends, as in HTML the end tags of rows and sections may be omitted."""

_UNWRAPPED = ("thead", "tbody", "span", "sup", "sub", "div", "p")
"""Elements of which OmniDocBench keeps the contents alone."""
_SKIPPED = ("colgroup", "math")
"""Elements that OmniDocBench removes with their contents; of formulas "alttext" stays."""


@dataclasses.dataclass
class Node:
    """An element of a table, with colspan and rowspan of a cell, else (1, 1).

    The content of a cell is its characters, and tags of elements in it; it has no children.
    """

    tag: str
    spans: tuple[int, int] = (1, 1)
    content: list[str] = dataclasses.field(default_factory=list)
    children: list["Node"] = dataclasses.field(default_factory=list)


@dataclasses.dataclass
class Table:
    """A table as a tree of `size` elements below the root, those inside cells too."""

    root: Node
    size: int


def find_table(text: str, is_plain: bool = False) -> Table | None:
    """Read the first table in a text, which may lack its end; None where there is none, or it is empty.

    >>> find_table("<table><tr><td>a<td>b</table>").size
    3

    Args:
      text: HTML, among other things.
      is_plain: whether it is normalised as OmniDocBench does: headers are cells, sections and markup of text go,
        whitespace is one space, and characters are those of NFKC.
    """
    reader = _Reader(is_plain)
    reader.feed(text)
    reader.close()
    return Table(reader.root, reader.size) if reader.root is not None and reader.size else None


class _Reader(HTMLParser):
    """Reads the first table of a text."""

    def __init__(self, is_plain: bool):
        super().__init__(convert_charrefs=True)
        self.is_plain = is_plain
        self.root: Node | None = None
        self.size = 0
        self._open: list[Node] = []  # from the table to the row or cell that is open
        self._inside: list[str] = []  # elements that are open in the cell
        self._skipped: str | None = None
        self._is_closed = False

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if self._is_closed or self._skipped or (self.root is None and tag != "table"):
            return
        if self.root is None:
            self.root = Node("table")
            self._open.append(self.root)
            return
        attributes = dict(attrs)
        if self.is_plain and tag in _SKIPPED:
            self._skipped = tag
            if tag == "math":
                self._write(f"${attributes.get('alttext') or ''}$")
        elif not (self.is_plain and tag in _UNWRAPPED):
            self._start("td" if self.is_plain and tag == "th" else tag, attributes)

    def _start(self, tag: str, attributes: dict[str, str | None]) -> None:
        is_structure = tag in (*_CELLS, "tr", *_SECTIONS) and "table" not in self._inside
        if self._cell is not None and not is_structure:
            self.size += 1
            self._cell.content.append(f"<{tag}>")
            if tag in _VOID:
                self._cell.content.append(f"</{tag}>")
            else:
                self._inside.append(tag)
            return
        self._close_cell()
        while self._open[-1].tag in _CLOSED_BY.get(tag, ()):
            self._open.pop()
        node = Node(tag, (_span(attributes.get("colspan")), _span(attributes.get("rowspan"))))
        self.size += 1
        self._open[-1].children.append(node)
        if tag not in _VOID:
            self._open.append(node)

    def handle_endtag(self, tag: str) -> None:
        if self._is_closed or self.root is None:
            return
        if self._skipped:
            self._skipped = None if tag == self._skipped else self._skipped
            return
        tag = "td" if self.is_plain and tag == "th" else tag
        if self._cell is not None and tag in self._inside:
            while self._inside:
                self._cell.content.append(f"</{self._inside[-1]}>")
                if self._inside.pop() == tag:
                    break
        elif any(node.tag == tag for node in self._open):
            self._close_cell()
            if tag not in _CELLS:
                while self._open.pop().tag != tag:
                    pass
            self._is_closed = not self._open

    def handle_data(self, data: str) -> None:
        if not (self._is_closed or self._skipped):
            self._write(data)

    def close(self) -> None:
        super().close()
        if self._open:
            self._close_cell()

    @property
    def _cell(self) -> Node | None:
        return self._open[-1] if self._open and self._open[-1].tag in _CELLS else None

    def _write(self, text: str) -> None:
        if self._cell is None:
            return
        if self.is_plain:
            text = unicodedata.normalize("NFKC", text.replace("\n", ""))
        for character in text:
            is_space = self.is_plain and character.isspace()
            if not (is_space and self._cell.content[-1:] == [" "]):
                self._cell.content.append(" " if is_space else character)

    def _close_cell(self) -> None:
        """End the cell that is open, if one is, and what is open in it."""
        if self._cell is not None:
            self._cell.content += [f"</{tag}>" for tag in reversed(self._inside)]
            self._inside.clear()
            self._open.pop()


def _span(value: str | None) -> int:
    return int(value) if value is not None and value.isascii() and value.isdigit() and len(value) < 6 else 1


def teds(answer: Table, expected: Table, is_structure: bool = False) -> float:
    """Compute the similarity of two tables, from 0 to 1; of their structures alone it is TEDS-S.

    >>> teds(find_table("<table><tr><td>ab</table>"), find_table("<table><tr><td>ac</table>"))
    0.75
    """
    distance = tree_distance(answer.root, expected.root, is_structure)
    return max(0.0, 1 - distance / max(answer.size, expected.size))


class _Flat:
    """A tree in postorder.

    Attributes:
      nodes: [N].
      left: [N] index of the leftmost leaf below each node, itself for a leaf.
      roots: indices of the nodes that have children and are not their parent's first child, and the tree's root: every
        pair of nodes with children is compared while that of one of these is.
      children: [N] indices.
    """

    def __init__(self, root: Node):
        self.nodes: list[Node] = []
        self.left: list[int] = []
        self.children: list[list[int]] = []
        below: list[list[int]] = [[]]
        for node, is_done in _walk(root):
            if not is_done:
                below.append([])
                continue
            index, children = len(self.nodes), below.pop()
            self.nodes.append(node)
            self.children.append(children)
            self.left.append(self.left[children[0]] if children else index)
            below[-1].append(index)
        last = {left: index for index, left in enumerate(self.left)}
        self.roots = sorted(index for index in last.values() if self.children[index])

    @functools.cached_property
    def leaves(self) -> list[int]:
        return [index for index, children in enumerate(self.children) if not children]


def _walk(root: Node) -> Iterator[tuple[Node, bool]]:
    """Return each node before and after those below it; without recursion, as answers may nest deeply."""
    pending = [(root, False)]
    while pending:
        node, is_done = pending.pop()
        yield node, is_done
        if not is_done:
            pending.append((node, True))
            pending += [(child, False) for child in reversed(node.children)]


def tree_distance(first: Node, second: Node, is_structure: bool = False) -> float:
    """Compute the edit distance of two ordered trees (Zhang and Shasha 1989, doi 10.1137/0218082).

    Pairs with a leaf, nearly all in tables, need no forests: the leaf becomes the most similar node of the other tree.

    Time goes with N M for trees of N and M nodes. `is_structure`: contents of cells do not count.
    """
    one, two = _Flat(first), _Flat(second)
    rename = _renames(one.nodes, two.nodes, is_structure)
    known = np.zeros_like(rename)
    known[one.leaves] = _from_leaves(rename[one.leaves], two)
    known[:, two.leaves] = _from_leaves(rename[:, two.leaves].T, one).T
    distance, renames = known.tolist(), rename.tolist()
    for root in one.roots:
        for other in two.roots:
            _compare(one, root, two, other, renames, distance)
    return distance[-1][-1]


def _from_leaves(rename: np.ndarray, tree: _Flat) -> np.ndarray:
    """Return the distances [L, M] of L leaves from the subtrees of a tree, from the costs of renaming [L, M]."""
    best = rename.copy()
    for index, children in enumerate(tree.children):
        if children:
            best[:, index] = np.minimum(best[:, index], best[:, children].min(axis=1))
    return best + (np.arange(len(tree.nodes)) - np.array(tree.left))


def _compare(
    one: _Flat, root: int, two: _Flat, other: int, rename: list[list[float]], distance: list[list[float]]
) -> None:
    """Fill in the distances of all pairs of subtrees that begin where those of two roots do."""
    start, begin = one.left[root], two.left[other]
    lefts = [left - begin for left in two.left[begin : other + 1]]
    rows = [[float(count) for count in range(other - begin + 2)]]
    for x in range(start, root + 1):
        above, before, costs, known = rows[-1], rows[one.left[x] - start], rename[x], distance[x]
        is_first = one.left[x] == start
        row = [above[0] + 1]
        for k, left in enumerate(lefts):
            is_tree = is_first and left == 0
            best = above[k] + costs[begin + k] if is_tree else before[left] + known[begin + k]
            best = min(best, above[k + 1] + 1, row[k] + 1)
            if is_tree:
                known[begin + k] = best
            row.append(best)
        rows.append(row)


def _renames(first: list[Node], second: list[Node], is_structure: bool) -> np.ndarray:
    """Return what exchanging each of N nodes for each of M costs, float64 [N, M]."""
    from rapidfuzz.distance import Levenshtein
    from rapidfuzz.process import cdist

    kinds: dict[tuple[str, tuple[int, int]], int] = {}
    one, two = (
        np.array([kinds.setdefault((node.tag, node.spans), len(kinds)) for node in nodes]) for nodes in (first, second)
    )
    costs = (one[:, None] != two[None, :]).astype(np.float64)
    if is_structure:
        return costs
    rows, columns = ([i for i, node in enumerate(nodes) if node.tag in _CELLS] for nodes in (first, second))
    if rows and columns:
        contents = [first[row].content for row in rows], [second[column].content for column in columns]
        cells = cdist(*contents, scorer=Levenshtein.normalized_distance, dtype=np.float64)
        block = np.ix_(rows, columns)
        costs[block] = np.maximum(costs[block], cells)
    return costs
