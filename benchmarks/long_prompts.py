"""One long prompt with several responses on a CPU: peak memory above the model, and CPU seconds.

``python benchmarks/long_prompts.py --prompt 32768`` scores one group and goes back through it, in
this process, and prints what it took as JSON. In another checkout it says what that one takes.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

from arm import process_memory


def main() -> None:
    """Scores and goes back; the first pass, of a short group, loads what torch loads late."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--prompt", type=int, default=32768)
    parser.add_argument("--response", type=int, default=128)
    parser.add_argument("--responses", type=int, default=4)
    parser.add_argument("--window", type=int)
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=1)
    arguments = parser.parse_args()
    import numpy as np
    import torch
    from transformers import MistralConfig, MistralForCausalLM

    from dpo_lightning.data.packing import collate_groups
    from dpo_lightning.data.tokens import TokenGroup
    from dpo_lightning.models.probe import choose_path

    torch.set_num_threads(1)
    config = MistralConfig(
        vocab_size=1024,
        hidden_size=32 * arguments.heads,
        intermediate_size=64 * arguments.heads,
        num_hidden_layers=2,
        num_attention_heads=arguments.heads,
        num_key_value_heads=max(1, arguments.heads // 2),
        max_position_embeddings=1 << 17,
        sliding_window=arguments.window,
    )
    torch.manual_seed(0)
    model = MistralForCausalLM(config).train()
    scorer, reason = choose_path(model, max_length=1 << 17)
    assert reason is None, reason
    draw = np.random.default_rng(0)

    def run(*lengths: int) -> tuple[float, float]:
        ids = [draw.integers(3, config.vocab_size, n).astype(np.int32) for n in lengths]
        ranks = tuple(range(1, len(ids)))
        group = TokenGroup(ids[0], tuple(ids[1:]), ranks, 1.0, "bench:0", "0")
        model.zero_grad()
        batch: Any = collate_groups([group], [0])
        start = time.process_time()
        logps = scorer.logps(model, batch)
        logps.sum().backward()
        return time.process_time() - start, float(logps[0])

    run(16, 4, 4)
    Path("/proc/self/clear_refs").write_text("5")
    base = process_memory("VmRSS")
    lengths = (arguments.prompt, *[arguments.response] * arguments.responses)
    found = [run(*lengths) for _ in range(arguments.repeats)]
    print(
        json.dumps(
            {
                "peak_bytes": process_memory("VmHWM") - base,
                "cpu_seconds": min(seconds for seconds, _ in found),
                "logps": found[0][1],
            }
        )
    )


if __name__ == "__main__":
    main()
