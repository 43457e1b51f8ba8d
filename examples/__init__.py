"""Programs that fuse a network and train it; run them from the root of the repository."""
