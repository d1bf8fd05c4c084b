"""A checkpoint behind transformers' OpenAI-style server."""
