"""The shared words: errors, registries, protocols, patterns, masks, statistics."""
