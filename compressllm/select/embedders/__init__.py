"""Embedders: texts to vectors whose cosine says how alike they are."""
