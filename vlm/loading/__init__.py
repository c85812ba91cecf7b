"""From a model's name to a checkpoint folder of ours, and from that to a live model.

The modules are imported by name where they are needed, since some bring torch along: `device` and `identity` are light,
`build`, `checkpoint` and `quantization` are not.
"""
