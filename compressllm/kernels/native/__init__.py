"""CPU kernels in C, compiled on first use: how they are built, loaded, checked and called."""
