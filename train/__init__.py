"""The trainer: FGID shards in, an adapter out. Its command is train/cli.py."""
