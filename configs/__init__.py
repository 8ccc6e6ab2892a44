"""Configuration. Frozen dataclasses state every setting and its only default; YAML presets and
`key=value` overrides change them.
"""
