"""Templates of model cards, and one card per checkpoint with its evidence."""
