"""What the built-in checkpoint's content depends on. Raise the version when the recipe gives other bytes."""

from __future__ import annotations

from pathlib import Path

# The pretrained model, where it is there; then 'builtin' means it, and else the toy made by this recipe.
WEIGHTS_DIR = Path(__file__).with_name("weights")
VERSION = 2
SEED = 0
RECIPE = f"built-in model, recipe {VERSION}, seed {SEED}"
