"""Settings of all tests that must be made before PyTorch is imported."""

import os

# By default OpenMP's threads spin while they wait. If other processes need the cores, each of the many small parallel
# regions of a small model then waits for a thread that does not run, and tests take twenty times as long.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
