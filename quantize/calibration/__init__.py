"""Corpora, token windows, and the streamed forward pass that gathers statistics."""
