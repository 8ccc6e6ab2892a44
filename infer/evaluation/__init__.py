"""Measures of an adapter on people that it was not trained on. Nothing here trains.

Results are frozen dataclasses of plain values, of which `dataclasses.asdict` makes JSON.
"""
