"""``python -m dpo_lightning.sweeps.report FOLDER``: the same as ``dpo-lightning report``."""

import sys

from dpo_lightning.sweeps.report.write import main

if __name__ == "__main__":
    sys.exit(main())
