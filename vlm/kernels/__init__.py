"""Fused pieces of a training step. Each file holds one: its formula, the kernel or its twin, and the public function.

What they share is the trade: an operation keeps as little as possible for the backward pass, and makes the rest again.
`vlm.kernels.install` puts them into a live model. Import the submodules.
"""
