"""A run's configuration: flags, recipe and folder, checked and typed."""
