"""Hyper-parameters: a search over any fields that matter to a method, on validation images."""
