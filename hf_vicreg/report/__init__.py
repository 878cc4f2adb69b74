"""A run as one HTML file that needs nothing else, and figures of what a model sees."""
