"""Before a run: what a set of images holds, and the same set stored at one size."""
