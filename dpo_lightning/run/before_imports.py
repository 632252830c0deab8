"""Settings of this process that a run makes before it imports what takes long.

The process that trials are forked from imports this first, as it imports the rest for all of them.
"""

import os

from dpo_lightning.memory.segments import allocate_in_segments
from dpo_lightning.tracking.quiet import quiet_loggers

os.environ["HYDRA_FULL_ERROR"] = "1"
quiet_loggers()
allocate_in_segments(os.environ)
