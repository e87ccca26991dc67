"""Shipping a shadow: detached models and exported files."""
