"""Plugin: blocks of few tokens, each noted with its process in the file that BLOCK_LOG names.

With BLOCK_SECONDS a block takes as long, so that something can happen meanwhile.
"""

import os
import time
from pathlib import Path

from dpo_lightning.reference import blocks, fill

blocks._LEAST_BLOCK_TOKENS = 64
_score_blocks = fill._score_blocks


def noted(numbers, model, computing):
    rank = 0 if computing.ranks is None else computing.ranks.rank
    if numbers and rank < len(numbers):
        name = computing.plan.blocks[numbers[rank]].name
        with Path(os.environ["BLOCK_LOG"]).open("a") as file:
            file.write(f"{os.getpid()} {name}\n")
        time.sleep(float(os.environ.get("BLOCK_SECONDS") or 0))
    return _score_blocks(numbers, model, computing)


fill._score_blocks = noted
