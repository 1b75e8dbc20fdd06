"""The process of one trial: ``python worker.py SPEC.json``, its stdin a pipe from the driver.

It is run as a file, and imports little before it listens: when its driver goes, however that goes,
the pipe is closed, and the process ends with all that it started.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from pathlib import Path


def _end_with_driver() -> None:
    while os.read(0, 1024):
        pass
    if hasattr(os, "killpg") and os.getpgrp() == os.getpid():
        os.killpg(0, signal.SIGKILL)
    os._exit(1)


if __name__ == "__main__":
    threading.Thread(target=_end_with_driver, daemon=True).start()
    from truenorm._study.trial import main

    main(Path(sys.argv[1]))
