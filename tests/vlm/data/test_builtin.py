"""The built-in rows are the same each time, small, varied, and their text is what is drawn."""

from __future__ import annotations

import subprocess
import sys

import numpy as np

from vlm.data.builtin import MAX_WIDTH, NUM_ROWS, NUM_SHOPS, builtin_row, builtin_rows


def test_rows_are_small_and_varied():
    rows = list(builtin_rows())
    assert len(rows) == NUM_ROWS
    assert len({row["group"] for row in rows}) == NUM_SHOPS
    assert len({row["text"] for row in rows}) > 0.95 * NUM_ROWS
    for row in rows:
        width, height = row["image"].size
        assert 28 <= height <= 56
        assert 28 <= width <= MAX_WIDTH
        # Ink on paper: what is drawn fits and can be told from the ground.
        values = np.asarray(row["image"]).astype(int)
        assert values.max() - values.min() > 60
        assert row["text"].strip()


def test_pixels_depend_on_the_number_alone():
    script = (
        "import hashlib\nfrom vlm.data.builtin import builtin_row\n"
        "print([hashlib.sha256(builtin_row(n)['image'].tobytes()).hexdigest() for n in (0, 100, 319)])"
    )
    other = subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True,
        text=True,
        check=True,
        env={"PYTHONHASHSEED": "7", "PATH": ""},
    )
    import hashlib

    assert other.stdout.strip() == str(
        [hashlib.sha256(builtin_row(n)["image"].tobytes()).hexdigest() for n in (0, 100, 319)]
    )


def test_every_default_split_has_rows(prepare):
    prepared = prepare(
        sources=[{"path": "builtin"}], required_splits=("train", "validation", "test"), max_dropped_fraction=0
    )
    assert sum(prepared.summary.num_rows.values()) == NUM_ROWS
    assert prepared.summary.num_rows["train"] > 0.7 * NUM_ROWS
    assert prepared.ledger == []


def test_matplotlib_is_not_imported():
    script = "import sys\nfrom vlm.data.builtin import builtin_row\nbuiltin_row(0)\nprint('matplotlib' in sys.modules, 'torch' in sys.modules)"
    assert subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    ).stdout.split() == ["False", "False"]
