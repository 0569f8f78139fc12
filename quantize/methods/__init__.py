"""Pure tensor mathematics: from weights and statistics to codes, scales and zero points. Knows no files."""
