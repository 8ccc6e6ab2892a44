"""Models behind four protocols (protocols.py); registry.py lists them, weights.py their files."""
