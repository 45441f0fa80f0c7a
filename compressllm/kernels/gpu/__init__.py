"""What runs on CUDA devices only: imported where used, since not every machine has triton."""
