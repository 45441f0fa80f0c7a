"""One-shot pruning: which weights of a linear stay, judged by calibration text or none."""
