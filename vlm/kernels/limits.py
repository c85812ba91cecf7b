"""Sizes that kernels work with and estimates of memory count with. Imports nothing."""

from __future__ import annotations

HEAD_CHUNK_BYTES = 128 * 2**20
"""Logits in float32 that the head's loss makes at once. At 152,000 words these are 220 rows, for which a product takes
as long as reading the head."""
HEAD_COPIES = 1.5
"""What lives at the peak, in units of a chunk: the logits, and their copy in 16 bit before or after the softmax."""
