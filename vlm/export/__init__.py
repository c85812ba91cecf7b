"""Exports of a trained adapter: the adapter itself and the merged model."""

from vlm.export.api import ExportSummary, export

__all__ = ["ExportSummary", "export"]
