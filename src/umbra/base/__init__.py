"""Other people's models: where their parts are, loading, identity, quantised and sharded weights, added tokens."""
