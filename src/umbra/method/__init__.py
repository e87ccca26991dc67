"""The method: its equations, the hooks that apply them, their fast forms, and divergences."""
