"""Images in files: a great many of them, or a great many in each."""
