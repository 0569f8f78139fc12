"""A release built again from its manifests, and compared with them."""
