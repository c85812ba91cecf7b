"""Similarity of JSON answers as trees.

Sources: Zhang and Shasha, "Simple Fast Algorithms for the Editing Distance between Trees and Related Problems" (SIAM J.
Comput. 18, 1989), for the distance; Kim et al., "OCR-free Document Understanding Transformer" (Donut, ECCV 2022),
section 3.2.1, for the similarity ``max(0, 1 − TED(answer, target) / TED(nothing, target))``. As in Donut's evaluation,
keys are nodes that cost 1, and values are leaves that cost their characters. The libraries with this algorithm have had
no release for years, hence our own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from rapidfuzz.distance import Levenshtein

from vlm.evaluation.metrics.metric import Clean, Score, best_of
from vlm.evaluation.metrics.records import parse_json, parse_reference


@dataclass(frozen=True)
class Node:
    """A node of an ordered tree."""

    label: str
    """A key, or a value's text."""
    children: list[Node] = field(default_factory=list)
    """From left to right."""
    is_value: bool = False
    """Whether the label is a value, which is compared by its characters."""

    @property
    def cost(self) -> int:
        """What it costs to insert or to delete the node."""
        return len(self.label) if self.is_value else 1


def json_similarity(references: Sequence[str], prediction: str, clean: Clean) -> Score:
    """Similarity of two JSON trees, between 0 and 1.

    The order of keys does not count, that of lists does. An answer that is no JSON has nothing in common with any.

    Args:
        references: JSON texts.
        prediction: The model's answer; a code fence around it does not count.
        clean: The declared normalisation, applied to values.

    Raises:
        DataError: A reference is no JSON.
    """
    try:
        found = tree_of(parse_json(prediction), clean)
    except ValueError:
        found = None
    scores = []
    for reference in references:
        expected = tree_of(parse_reference(reference), clean)
        if found is None:
            scores.append((0.0, 1.0))
            continue
        whole = tree_distance(tree_of({}, clean), expected)
        distance = tree_distance(*without_common_parts(found, expected))
        scores.append((max(0.0, 1 - distance / whole) if whole else float(distance == 0), 1.0))
    return best_of(scores, "higher")


def tree_of(value: Any, clean: Clean) -> Node:
    """Turns parsed JSON into a tree.

    Args:
        value: Objects, lists and plain values; null is an empty text.
        clean: Normalisation of texts.
    """
    return Node("", _children(value, clean))


def _children(value: Any, clean: Clean) -> list[Node]:
    if isinstance(value, dict):
        return [Node(key, _children(value[key], clean)) for key in sorted(value)]
    if isinstance(value, list):
        # An object in a list needs a node of its own, or its fields would mix with its neighbours'.
        return [
            child
            for item in value
            for child in (
                [Node("", _children(item, clean))] if isinstance(item, dict | list) else _children(item, clean)
            )
        ]
    text = "" if value is None else str(value).lower() if isinstance(value, bool) else clean(str(value))
    return [Node(text, is_value=True)]


def without_common_parts(left: Node, right: Node) -> tuple[Node, Node]:
    """Takes away what two trees share at their edges, which saves most of the time where few fields differ.

    Costs obey the triangle inequality. So equal roots, and equal trees at either end of a row of children, can be paired
    with each other in a cheapest way: whatever a pairing does with them can be done without them at no higher cost.

    Args:
        left: A tree with the root of `right`.
        right: The other tree.

    Returns:
        Two trees of the same distance.
    """
    rows = left.children, right.children
    while True:
        start, most = 0, min(len(rows[0]), len(rows[1]))
        while start < most and rows[0][start] == rows[1][start]:
            start += 1
        end = 0
        while end < most - start and rows[0][-1 - end] == rows[1][-1 - end]:
            end += 1
        rows = rows[0][start : len(rows[0]) - end], rows[1][start : len(rows[1]) - end]
        heads = [(row[0].label, row[0].is_value) if len(row) == 1 else None for row in rows]
        if heads[0] is None or heads[0] != heads[1]:
            return Node(left.label, rows[0]), Node(right.label, rows[1])
        rows = rows[0][0].children, rows[1][0].children


def tree_distance(left: Node, right: Node) -> int:
    """Cost of the cheapest way to make one ordered tree of another by inserting, deleting and relabelling nodes.

    Args:
        left: From this tree.
        right: To this tree.

    Returns:
        The Zhang–Shasha distance under the costs of `Node.cost` and `_relabelling`.
    """
    tree, other = _Order(left), _Order(right)
    distances = [[0] * len(other.nodes) for _ in tree.nodes]
    for i in tree.roots:
        for j in other.roots:
            _subtrees(i, j, tree, other, distances)
    return distances[-1][-1]


def _subtrees(i: int, j: int, tree: _Order, other: _Order, distances: list[list[int]]) -> None:
    """Fills in the distances of all pairs of subtrees whose roots lie on the leftmost paths below i and j."""
    first, other_first = tree.leftmost[i], other.leftmost[j]
    other_costs, other_leftmost = other.costs, other.leftmost
    # forest[x][y]: the first x nodes of one subtree, in postorder, against the first y of the other.
    row = [0]
    for cost in other_costs[other_first : j + 1]:
        row.append(row[-1] + cost)
    forest = [row]
    for x in range(first, i + 1):
        previous, delete, known = forest[-1], tree.costs[x], distances[x]
        is_whole = tree.leftmost[x] == first
        # What remains of the first forest without the subtree below x.
        before = forest[tree.leftmost[x] - first]
        best = previous[0] + delete
        row = [best]
        for at, y in enumerate(range(other_first, j + 1)):
            best = min(best + other_costs[y], previous[at + 1] + delete)
            if is_whole and other_leftmost[y] == other_first:
                best = known[y] = min(best, previous[at] + _relabelling(tree.nodes[x], other.nodes[y]))
            else:
                best = min(best, before[other_leftmost[y] - other_first] + known[y])
            row.append(best)
        forest.append(row)


def _relabelling(left: Node, right: Node) -> int:
    if left.is_value and right.is_value:
        return int(Levenshtein.distance(left.label, right.label))
    if left.is_value or right.is_value:
        return left.cost + right.cost
    return int(left.label != right.label)


class _Order:
    """A tree in postorder.

    Attributes:
        nodes: From the first leaf to the root.
        costs: Of each node.
        leftmost: Position of the leftmost leaf below each node, or of the node itself.
        roots: The last node of each that share a leftmost leaf; from these, all pairs of subtrees are reached.
    """

    def __init__(self, root: Node) -> None:
        self.nodes: list[Node] = []
        self.leftmost: list[int] = []
        self._walk(root)
        self.costs = [node.cost for node in self.nodes]
        self.roots = sorted({leaf: position for position, leaf in enumerate(self.leftmost)}.values())

    def _walk(self, node: Node) -> int:
        leaves = [self._walk(child) for child in node.children]
        self.nodes.append(node)
        self.leftmost.append(leaves[0] if leaves else len(self.nodes) - 1)
        return self.leftmost[-1]
