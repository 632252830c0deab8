"""``python -m dpo_lightning``: the same as ``python train.py``."""

import os
import sys

# Hydra then raises its errors instead of printing several lines and exiting with 1.
os.environ["HYDRA_FULL_ERROR"] = "1"

from dpo_lightning.cli import main

if __name__ == "__main__":
    sys.exit(main())
