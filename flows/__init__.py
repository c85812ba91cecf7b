"""Flows: what is deployed, scheduled and run from the command line."""
