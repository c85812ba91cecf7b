"""Metrics of predictions, and the report page. Import the submodules; nothing is loaded from here."""
