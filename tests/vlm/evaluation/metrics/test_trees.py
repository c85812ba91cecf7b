import random

import pytest

from vlm.evaluation.metrics.trees import Node, json_similarity, tree_distance, without_common_parts


def tree(label: str, *children: Node) -> Node:
    return Node(label, list(children))


def test_the_example_of_zhang_and_shasha() -> None:
    # Figure 4 of the paper: delete c and insert it above d.
    left = tree("f", tree("d", tree("a"), tree("c", tree("b"))), tree("e"))
    right = tree("f", tree("c", tree("d", tree("a"), tree("b"))), tree("e"))
    assert tree_distance(left, right) == 2


def test_distances_of_small_trees() -> None:
    assert tree_distance(tree("a"), tree("a")) == 0
    assert tree_distance(tree("a"), tree("b")) == 1
    assert tree_distance(tree("a"), tree("a", tree("b"), tree("c"))) == 2
    # Order counts: one child is taken out and put in again.
    assert tree_distance(tree("a", tree("b"), tree("c")), tree("a", tree("c"), tree("b"))) == 2
    values = [Node(text, is_value=True) for text in ("12.50", "12.58", "")]
    assert tree_distance(values[0], values[1]) == 1
    assert tree_distance(values[0], values[2]) == 5
    # A value is no key: out with five characters, in with one key.
    assert tree_distance(values[0], tree("12.50")) == 6


def random_tree(choice: random.Random, depth: int) -> Node:
    if depth == 0 or choice.random() < 0.3:
        return Node(choice.choice(["", "a", "ab", "xyz"]), is_value=True)
    return tree(choice.choice("pq"), *(random_tree(choice, depth - 1) for _ in range(choice.randrange(4))))


def test_leaving_common_parts_out_changes_no_distance() -> None:
    choice = random.Random(0)
    num_smaller = 0
    for _ in range(300):
        left, right = (tree("", *(random_tree(choice, 3) for _ in range(choice.randrange(4)))) for _ in range(2))
        if choice.random() < 0.5:  # something in common, for sure
            shared = random_tree(choice, 3)
            left, right = (tree("", *node.children, shared) for node in (left, right))
        smaller = without_common_parts(left, right)
        num_smaller += smaller != (left, right)
        assert tree_distance(*smaller) == tree_distance(left, right)
    assert num_smaller > 150


@pytest.mark.parametrize(
    ("reference", "prediction", "expected"),
    [
        ('{"a": "xy", "b": "z"}', '{"b": "z", "a": "xy"}', 1),  # keys are sorted
        # Nothing to the target: two keys and three characters, 5. One character is wrong.
        ('{"a": "xy", "b": "z"}', '{"a": "xq", "b": "z"}', 1 - 1 / 5),
        ('{"a": "xy", "b": "z"}', '{"a": "xy"}', 1 - 2 / 5),  # a key and a character are missing
        ('{"a": "x"}', '{"a": "x", "b": "long text"}', 0),  # ten to take away, more than the target's two
        ('["x", "y"]', '["y", "x"]', 0),  # lists have an order
        ("{}", "{}", 1),
        ("{}", '{"a": 1}', 0),
        ('{"a": "x"}', "no JSON", 0),
        ('{"a": true, "b": null}', '{"b": "", "a": "true"}', 1),  # as text
    ],
)
def test_json_similarity(reference: str, prediction: str, expected: float) -> None:
    assert json_similarity([reference], prediction, str) == (pytest.approx(expected), 1)
