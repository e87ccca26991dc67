"""`ShadowModel`: a base and its shadows as one transformers model."""
