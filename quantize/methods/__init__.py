"""Pure tensor mathematics: weights and statistics in; codes, scales and zero points out. No file access."""
