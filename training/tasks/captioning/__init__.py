"""A sentence for an image."""
