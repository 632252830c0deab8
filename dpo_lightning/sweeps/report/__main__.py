"""``python -m dpo_lightning.sweeps.report FOLDER``."""

import sys

from dpo_lightning.sweeps.report.write import main

if __name__ == "__main__":
    sys.exit(main())
