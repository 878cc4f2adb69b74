"""The model card's template and generator, and one card per checkpoint with its evidence."""
