"""Prefect shells of the seven steps: compute the key, look it up, make one core call, publish, log."""
