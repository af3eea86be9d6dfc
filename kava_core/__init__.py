"""Offline latent-reasoning distillation: everything that has a tensor or a format in it."""

__version__ = "0.1.0"
