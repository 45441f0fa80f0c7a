"""Contextual sparsity: decode with some neurons only, and let the whole model correct what comes out."""
