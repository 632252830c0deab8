"""Train with preferences: ``python train.py model=llama beta=0.1``, ``--help`` for more.

Nothing here or in what it imports loads torch, so that a wrong setting is answered at once.
"""

import os
import signal
import sys

# Hydra then raises its errors instead of printing several lines and exiting with 1.
os.environ["HYDRA_FULL_ERROR"] = "1"

# Until the program listens, Ctrl-C ends it without a traceback of what is just being imported.
if __name__ == "__main__" and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)

from dpo_lightning.cli import main

if __name__ == "__main__":
    sys.exit(main())
