"""Generative modules: the denoiser, its training on one class of one client, and drawing images from it."""
