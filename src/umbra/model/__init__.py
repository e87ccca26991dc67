"""`ShadowModel`: a base and its shadows as one transformers model."""

from umbra.model.attach import attach

__all__ = ["attach"]  # importing any module of this room imports all classes, between which attach chooses
