"""Calibration: text sources, token windows, and the walk over decoder blocks."""
