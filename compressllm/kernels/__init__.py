"""What computes sparse linears: torch and core only."""
