"""Exports of what was trained: the adapter itself, merged and quantised models, and GGUF files, each verified."""

from vlm.export.api import ExportSummary, export
from vlm.export.verify import Verification, verify_export

__all__ = ["ExportSummary", "Verification", "export", "verify_export"]
