"""Base models: their architectures, loading, fingerprints, quantized and sharded weights, and added tokens."""
