"""How fast sparse linears and models are, against dense ones, on this machine."""
