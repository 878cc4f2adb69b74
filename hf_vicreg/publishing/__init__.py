"""From a folder on a disk to a repository on the Hub that others load at once."""
