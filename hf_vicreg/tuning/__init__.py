"""Numbers of a recipe chosen by successive halving: `hf-vicreg tune`."""
