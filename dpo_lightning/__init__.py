"""Direct Preference Optimization experiments on Lightning and Hydra.

Importing this package imports nothing heavy: the command line answers before torch is loaded.
"""

import time

from dpo_lightning.moved import find_moved

__version__ = "0.1.0"

STARTED = time.perf_counter()
"""When the program began, for the wall time of the whole process."""

find_moved()
