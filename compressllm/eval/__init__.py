"""Evaluation: perplexity, tasks, agreement with a parent, the gate, generation."""
