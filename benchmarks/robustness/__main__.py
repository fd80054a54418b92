"""What nothing can break: kills, damaged files, a stranger's files, full disks, two writers. See benchmarks/README.md.

    python -m benchmarks.robustness all
    python -m benchmarks.robustness damage --n 100 --seed 1 --wrong wrong.json

Linux only. TMPDIR=/dev/shm makes it faster where that has room.
"""

from .commands import cli

cli()
