"""Models of images and texts: how well they find one by the other."""
