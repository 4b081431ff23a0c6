"""AR-Omni in JAX: one autoregressive decoder over text, image and speech tokens."""

__version__ = "0.1.0"
