"""The folder of finished and unfinished work: layout, lock, manifests, resumption."""
