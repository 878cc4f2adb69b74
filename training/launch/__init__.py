"""Processes of a run: how they start, talk to each other and are asked to stop."""
