"""Adapters: a small share of a pruned model is trained, and what is merged keeps exactly the same zeros."""
