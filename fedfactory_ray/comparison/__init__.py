"""Every method on one partition with one recipe."""
