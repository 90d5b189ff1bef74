"""Tables as trees, and TEDS: against the definition of the distance, and cases worked out by hand."""

import functools
import random

import pytest

from eval.metrics.tables import Node, find_table, teds, tree_distance


def brute_force(first, second):
    """The edit distance of two forests by its recursion, without any of the algorithm's order."""

    def size(forest):
        return sum(1 + size(children) for _, children in forest)

    def rename(one, other):
        (tag, spans, content), (other_tag, other_spans, other_content) = one, other
        if (tag, spans) != (other_tag, other_spans):
            return 1
        return levenshtein(content, other_content) / max(len(content), len(other_content), 1)

    @functools.cache
    def forests(one, other):
        if not one or not other:
            return size(one) + size(other)
        (label, children), (other_label, other_children) = one[-1], other[-1]
        return min(
            forests(one[:-1] + children, other) + 1,
            forests(one, other[:-1] + other_children) + 1,
            forests(one[:-1], other[:-1]) + forests(children, other_children) + rename(label, other_label),
        )

    return forests((frozen(first),), (frozen(second),))


def levenshtein(one, other):
    row = list(range(len(other) + 1))
    for number, mine in enumerate(one, 1):
        above, row[0] = row[0], number
        for index, theirs in enumerate(other, 1):
            above, row[index] = row[index], min(row[index] + 1, row[index - 1] + 1, above + (mine != theirs))
    return row[-1]


def frozen(node):
    return (node.tag, node.spans, tuple(node.content)), tuple(frozen(child) for child in node.children)


def random_tree(rng, depth=0):
    if depth == 3 or (depth and rng.random() < 0.4):
        return Node("td", (rng.choice([1, 1, 2]), 1), rng.choices("ab", k=rng.randrange(4)))
    children = [random_tree(rng, depth + 1) for _ in range(rng.randrange(4))]
    return Node(rng.choice(["tr", "tbody"]), children=children)


def test_distances_equal_their_definition():
    rng = random.Random(0)
    for _ in range(150):
        first, second = random_tree(rng), random_tree(rng)
        assert tree_distance(first, second) == pytest.approx(brute_force(first, second), abs=1e-12)


def table(*rows, head=""):
    return f"<table>{head}{''.join(f'<tr>{row}</tr>' for row in rows)}</table>"


def score(answer, expected, is_plain=False, **options):
    return teds(find_table(answer, is_plain), find_table(expected, is_plain), **options)


@pytest.mark.parametrize(
    ("answer", "expected", "value", "structure"),
    [
        (table("<td>a</td><td>b</td>"), table("<td>a</td><td>b</td>"), 1, 1),
        # One of four characters of one cell, of 3 elements.
        (table("<td>abcd</td><td>b</td>"), table("<td>abcx</td><td>b</td>"), 1 - 0.25 / 3, 1),
        # A row of two cells is missing: 3 of 6 elements.
        (table("<td>a</td><td>b</td>"), table("<td>a</td><td>b</td>", "<td>c</td><td>d</td>"), 1 / 2, 1 / 2),
        # A cell of another span is another cell, whatever it contains.
        (table('<td colspan="2">a</td>'), table("<td>a</td>"), 1 / 2, 1 / 2),
        # Sections and headers are elements like others.
        (table("<th>a</th>"), table("<td>a</td>"), 1 / 2, 1 / 2),
        ("<table><tbody><tr><td>a</table>", table("<td>a</td>"), 2 / 3, 2 / 3),
        # Markup in a cell is a unit of its content: <b>, a, </b> against a; and counts among the elements.
        (table("<td><b>a</b></td>"), table("<td>a</td>"), 1 - 2 / 3 / 3, 1),
    ],
)
def test_values_worked_out_from_the_definition(answer, expected, value, structure):
    assert score(answer, expected) == score(expected, answer) == pytest.approx(value)
    assert score(answer, expected, is_structure=True) == pytest.approx(structure)


def test_normalised_tables_differ_in_text_and_spans_alone():
    answer = '<table border="1"><thead><tr><th style="x">Ａ\n1</th><th> b<sup>2</sup>  c</th></tr></thead></table>'
    assert score(answer, table("<td>A1</td><td> b2 c</td>"), is_plain=True) == 1
    assert score(answer, table("<td>A1</td><td> b2 c</td>")) < 1
    formula = '<colgroup><col></colgroup><tr><td><math alttext="x^2"><mi>x</mi></math></td></tr>'
    assert score(f"<table>{formula}</table>", table("<td>$x^2$</td>"), is_plain=True) == 1


@pytest.mark.parametrize("text", ["", "a", "<td>a</td>", "<table></table>", "<tabl"])
def test_a_text_without_a_table_has_none(text):
    assert find_table(text) is None


def test_tables_are_read_with_omitted_tags_text_around_and_cut_off():
    whole = table("<td>a &amp; b</td><td>c</td>", "<td>d</td>")
    for text in (
        f"Here: {whole} and {table('<td>z</td>')}",
        "<TABLE><TR><TD>a & b<TD>c<TR><TD>d</TABLE>",
        "<table><tr><td>a &amp; b</td><td>c</td></tr><tr><td>d",
        "<table></td></b><tr><td>a &amp; b</td></i><td>c</td></tr><tr><td>d",
    ):
        assert frozen(find_table(text).root) == frozen(find_table(whole).root)


def test_a_table_in_a_cell_is_its_content():
    inner = table("<td>a</td>")
    root = find_table(table(f"<td>{inner}</td><td>b</td>")).root
    ((first, second),) = (row.children for row in root.children)
    assert first.content == ["<table>", "<tr>", "<td>", "a", "</td>", "</tr>", "</table>"] and second.content == ["b"]


def test_deep_and_large_tables_take_neither_recursion_nor_long():
    assert score(f"<table>{'<b>' * 5000}", table("<td>a</td>")) == 0
    rows = [f"<td>{number}</td><td>{number * 7}</td><td>x</td>" for number in range(60)]
    assert score(table(*rows), table(*rows[:-6])) == pytest.approx(0.9)
