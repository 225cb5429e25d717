"""Settings of all tests that must be made before PyTorch is imported."""

import os

# By default OpenMP's threads spin while they wait. If other processes need the cores, each of the many small parallel
# regions of a small model then waits for a thread that does not run, and tests take twenty times as long.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

# The processes of pytest-xdist share the cores.
if workers := os.environ.get("PYTEST_XDIST_WORKER_COUNT"):
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // int(workers))))
