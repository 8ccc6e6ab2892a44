"""The adapter itself: conditions in, tokens and attention out. Knows records and regions, and
nothing of pipelines.
"""
