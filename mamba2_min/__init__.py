"""Mamba-2 from scratch: a state-space language model small enough to read in an evening."""

import os

# A thread of torch's that waits for another keeps its core busy, by default for as long as it takes. On a machine that
# does something else besides, the other one may be waiting for that very core: training was then four times as slow.
# It takes effect where torch has not been imported yet.
os.environ.setdefault("GOMP_SPINCOUNT", "30000")
