"""Objectives side by side, each trained for the same time: `hf-vicreg compare`."""
