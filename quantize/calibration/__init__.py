"""Corpora, token windows, and the streamed forward pass that collects statistics."""
