"""A run's folder: files that appear whole or not at all, their names, and what is there and whole."""
