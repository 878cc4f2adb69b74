"""A run that plans itself: what to train, on what, for how long, from the images, the machine and the time."""
