"""Methods to compare with, on the same partition and with the same classifier recipe."""
