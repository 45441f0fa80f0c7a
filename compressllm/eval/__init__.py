"""Evaluation: perplexity, its gate, generation."""
