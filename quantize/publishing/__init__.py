"""Finished branches: cards, configs, reports, and their way to the hub or to git."""
