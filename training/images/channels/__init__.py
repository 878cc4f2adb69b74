"""Images of any number of channels, any depth and any size: read by windows, measured, and their own views."""
