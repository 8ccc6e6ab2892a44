"""Helpers for tests of storage."""

# a program that holds the lock of the output in its argument until it is killed
HOLDER = """
import sys, time
from stages.storage.lock import RunLock
from stages.storage.store import Store
with RunLock(Store(sys.argv[1])):
    print("held", flush=True)
    time.sleep(600)
"""
