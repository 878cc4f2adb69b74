"""One step after another: the loop, the optimiser, checkpoints and going on from them."""
