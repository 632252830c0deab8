"""Plugin: blocks of few tokens, each noted with its process in the file that BLOCK_LOG names.

With BLOCK_PROCESSES a block begins when so many processes have noted one. With BLOCK_SECONDS a
block takes as long, so that something can happen meanwhile.
"""

import os
import time
from pathlib import Path

from dpo_lightning.reference import blocks, fill
from tests.support.waiting import until

blocks._LEAST_BLOCK_TOKENS = 64
_score_blocks = fill._score_blocks


def noted(numbers, model, computing):
    rank = 0 if computing.ranks is None else computing.ranks.rank
    log = Path(os.environ["BLOCK_LOG"])
    if numbers and rank < len(numbers):
        name = computing.plan.blocks[numbers[rank]].name
        with log.open("a") as file:
            file.write(f"{os.getpid()} {name}\n")
        count = int(os.environ.get("BLOCK_PROCESSES") or 1)
        until(lambda: len({line.split()[0] for line in log.read_text().splitlines()}) >= count)
        time.sleep(float(os.environ.get("BLOCK_SECONDS") or 0))
    return _score_blocks(numbers, model, computing)


fill._score_blocks = noted
