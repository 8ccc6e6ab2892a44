"""The record, the stage contract, and the five stages that turn a photograph into a training
sample.
"""
