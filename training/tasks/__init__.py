"""What an encoder is used for: a command, a model and its data for each task."""
