"""The Ray cluster: what runs where, on which device, and whom it has lost."""
