"""The built-in model, for runs without a download."""

from vlm.builtin.model import make_builtin_checkpoint, recipe_digest_text
from vlm.builtin.tokenizer import build_tokenizer

__all__ = ["build_tokenizer", "make_builtin_checkpoint", "recipe_digest_text"]
