"""The embedded example: a small picture world, its data, and a small LLaVA trained on it."""
