"""The configuration: one typed tree, its presets, and the command line that combines them."""
