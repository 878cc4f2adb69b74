"""What a run says of itself: its log, its health, its curves, its end."""
