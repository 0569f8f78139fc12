"""A finished branch: its card, its config, its folder put into place."""
