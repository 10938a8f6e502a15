"""Measurements for jobs/benchmark.py: what the system costs here, and what a choice brings."""
