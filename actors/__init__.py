"""Processes of a run: Ray's actors and cluster, and the same roles in one process."""

import os
import sys

if "ray" not in sys.modules:
    # When the local raylet is gone, Ray's C++ part ends a process whose parent is gone too: a
    # driver below nohup, or the first process of a container. This is the process whose life it
    # then asks for instead of the parent's. It is read when Ray is imported, hence here.
    os.environ["RAY_RAYLET_PID"] = str(os.getpid())
