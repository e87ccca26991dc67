"""The adapter folder: writing, reading and checking it, its model card, and how an adapter is prompted."""
