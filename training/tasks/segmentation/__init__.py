"""Segmentation: UperNet over the encoder, masks and their measures, large images by windows."""
