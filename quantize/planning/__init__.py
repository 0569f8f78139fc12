"""Plan a build from a recipe and a model's headers: branches, exact sizes, keys, what is fresh. Imports no torch."""
