"""Threads of OpenMP that sleep while they wait for each other: to be imported before torch.

By default they spin, for then the next loop begins a little sooner. On a machine that has other things to do, a thread
that spins keeps the one that it waits for from running. Measured on two cores with `mfn`, 64 crops a step: idle, 41
crops/s spinning and 40 asleep; beside four other busy processes 6 and 12, where a fair share would be 14. Whoever sets
OMP_WAIT_POLICY is left alone.
"""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
