"""Runs a command and writes its peak resident bytes to a file: ``python peak.py FILE COMMAND...``.

A process inherits the peak of whoever forked it, so a large parent cannot ask the system for a small child's peak;
this one is small.
"""

import resource
import subprocess
import sys

status = subprocess.call(sys.argv[2:])
with open(sys.argv[1], "w", encoding="utf-8") as out:
    out.write(str(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024))
sys.exit(status if status >= 0 else 128 - status)
