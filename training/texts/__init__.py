"""Texts: captions of images, and the tokens they become."""
