"""From files to batches of views: what is read, in which order, and how it is augmented."""
