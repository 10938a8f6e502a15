"""The classifier: networks, augmentation, fitting with Ray Train, and honest evaluation."""
