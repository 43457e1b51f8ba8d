"""Programs that fuse a network and train it. Run them from the root: `python -m examples.digits`."""
