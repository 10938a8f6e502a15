"""Measurements: what the system costs here, and what a choice brings."""
