"""Files on this machine: written whole, hashed, cached."""
