"""Who does the work of a pass: this process, or a Ray cluster."""
