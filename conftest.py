"""Settings of all tests that have to be made before PyTorch is imported."""

import os

# OpenMP's threads otherwise spin while they wait, and where other work wants the cores, each of the many small parallel
# regions of a small model waits for a thread that is not running: tests then take twenty times as long.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
