"""LLaVA records and pictures, up to the batches that a model takes."""
