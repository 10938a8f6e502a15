"""Images: where they come from, how they are dealt to clients, how they become tensors."""
