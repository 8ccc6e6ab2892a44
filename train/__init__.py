"""The trainer: FGID shards in, an adapter out. The command is train/cli.py."""
