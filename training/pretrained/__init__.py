"""What a run takes from models that are there already: weights to begin with, a teacher, adapters."""
