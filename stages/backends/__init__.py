"""Real models behind four small protocols; see registry.py for the names and weights.py for their
files.
"""
