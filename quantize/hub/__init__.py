"""The hub: its client, and its errors as plain sentences."""
