"""A process of `hola prepare`: Beam's worker, quieter, and never outliving the process that started it.

python -m train.data.worker PID     what `pipeline` runs, once per core; PID is its own
"""

from __future__ import annotations

import logging
import os
import signal
import sys
import threading
import time


def leave_with(pid: int) -> None:
    """Ends this process soon after another has ended, however that was: killed, it could not say goodbye."""
    while True:
        try:
            os.kill(pid, 0)
        except OSError:
            os._exit(1)
        time.sleep(0.5)


def main() -> None:
    threading.Thread(target=leave_with, args=(int(sys.argv.pop(1)),), daemon=True).start()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the process that started it decides what an interrupt ends
    logging.disable(logging.ERROR)
    from apache_beam.runners.worker import sdk_worker_main

    sdk_worker_main.main(sys.argv)
    os._exit(0)  # an interrupted task may still be writing, and its threads would abort an ordinary end


if __name__ == "__main__":
    main()
