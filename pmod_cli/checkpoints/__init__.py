"""Finds, reads and writes checkpoints."""
