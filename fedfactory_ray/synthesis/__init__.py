"""Synthesis: a class-balanced data set drawn from the modules, as Parquet."""
