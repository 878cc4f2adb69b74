"""Classes of images, from many labels or few."""
