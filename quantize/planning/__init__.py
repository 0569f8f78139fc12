"""From a recipe and a model's headers to a plan: branches, exact sizes, keys, what is fresh. Imports no torch."""
