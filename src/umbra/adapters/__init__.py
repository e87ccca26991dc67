"""The adapter folder: reading, writing and checking it, its model card, and how prompts are formatted."""
