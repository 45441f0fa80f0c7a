"""Models: checkpoints on disk, their blocks and linears, and what passes from stage to stage."""
