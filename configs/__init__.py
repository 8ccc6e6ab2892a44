"""Configuration: frozen dataclasses are the only defaults, YAML presets and key=value overrides sit
on top.
"""
