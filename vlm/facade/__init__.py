"""The notebook way in: a thin layer over the core under the names that vision fine-tuning notebooks use.

`vlm` exports what is for users; the modules here are imported when one of those names is first used.
"""
