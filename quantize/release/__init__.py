"""Manifest and model card of a finished branch."""
