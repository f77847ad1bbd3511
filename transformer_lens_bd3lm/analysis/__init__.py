"""What researchers ask, one file a question; uses only the public surface."""
