"""Stages: recipes and the runner that puts them through."""
