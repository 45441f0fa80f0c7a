"""Quantisation of weights that leaves the mask as it is."""
