"""A Space, the app of a published model: copied into it as this folder is, it needs nothing else of ours."""
