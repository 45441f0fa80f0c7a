"""Choice of the records that recovery training learns from."""
