"""The ConsistentID adapter and the way from a record to its inputs.

It imports records and regions from `stages`, and nothing of the pipeline.
"""
