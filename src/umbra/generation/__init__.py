"""Generating text: the shared cache, decoding, and speculative decoding with the shadow as draft model."""
