"""The built-in model, for runs without a download."""

from vlm.builtin.model import make_builtin_checkpoint
from vlm.builtin.recipe import RECIPE
from vlm.builtin.tokenizer import build_tokenizer

__all__ = ["RECIPE", "build_tokenizer", "make_builtin_checkpoint"]
