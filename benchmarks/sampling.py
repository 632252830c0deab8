"""Tokens a second of answers, eight to a prompt, beside ``generate`` of transformers.

``make bench-sampling``: the same prompts, model, threads and lengths on both sides, in turns in one
process, the other way round every other time. Nothing is timed before both are shown to draw from
the model's own distribution. Ends are forbidden, so that each answer has all of its tokens.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))

from against import Ratio
from machine import describe_machine
from workload import SIZES, SPECIAL, make_model

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results" / "sampling.json"
MARKS = ("<!-- bench-sampling -->", "<!-- end of bench-sampling -->")
# How far the mean of log p of drawn tokens may be from its expectation, in standard errors.
_FAR = 4.0
# Load of a machine above which other work is said to have run.
_QUIET = 0.5
# Share of our tokens that the same noise has to draw from the scores of a plain forward pass.
_SAME = 0.999


@dataclass(frozen=True, slots=True)
class Load:
    """The work of one draw.

    Attributes:
        size: Name of the model's shape.
        prompts: Prompts of a batch.
        prompt_tokens: Tokens of each.
        answers: Answers to each.
        answer_tokens: Tokens of each answer.
    """

    size: str = "small"
    prompts: int = 8
    prompt_tokens: int = 256
    answers: int = 8
    answer_tokens: int = 64

    @property
    def tokens(self) -> int:
        """Tokens that are drawn in all."""
        return self.prompts * self.answers * self.answer_tokens


class Arms:
    """The ways to draw: ours, ours with copied keys, and transformers'.

    Args:
        folder: Where a model is, and is made where there is none.
        load: What is drawn.
    """

    def __init__(self, folder: Path, load: Load) -> None:
        import numpy as np
        import torch
        from transformers import AutoModelForCausalLM

        from dpo_lightning.models.probe import choose_path
        from dpo_lightning.models.scoring import Scorer

        if not (folder / "config.json").exists():
            make_model(folder, SIZES[load.size])
        self.load = load
        self._model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        # No token ends an answer.
        self._model.generation_config.eos_token_id = None
        self._tokenizer = SimpleNamespace(eos_token_id=None)
        self._flat, _ = choose_path(self._model, max_length=load.prompt_tokens + load.answer_tokens)
        assert self._flat.path == "flat"
        self._padded = Scorer("padded")
        dice = np.random.default_rng(0)
        ids = dice.integers(
            len(SPECIAL), SIZES[load.size].vocabulary, (load.prompts, load.prompt_tokens)
        )
        self.prompts = [row.astype(np.int32) for row in ids]
        self._turn = 0

    def ours(self) -> Any:
        """Answers of ours, (prompts * answers, tokens)."""
        return self._drawn(self._flat)

    def copied(self) -> Any:
        """The same with the cache of transformers, expanded once its prompts are computed."""
        with self._flat.plain(self._model):
            return self._drawn(self._padded)

    def transformers(self) -> Any:
        """Answers of ``generate``."""
        import torch
        from transformers import GenerationConfig

        load = self.load
        settings = GenerationConfig(
            do_sample=True,
            temperature=1.0,
            top_k=0,
            top_p=1.0,
            num_return_sequences=load.answers,
            max_new_tokens=load.answer_tokens,
            eos_token_id=None,
            pad_token_id=2,
        )
        ids = torch.tensor([prompt.tolist() for prompt in self.prompts])
        with self._flat.plain(self._model) as model, torch.no_grad():
            found = model.generate(
                input_ids=ids, attention_mask=torch.ones_like(ids), generation_config=settings
            )
        return found[:, load.prompt_tokens :]

    def _drawn(self, scorer: Any) -> Any:
        import torch

        from dpo_lightning.evaluation.many_answers import draw_batch

        found = draw_batch(
            self._model,
            scorer,
            self._tokenizer,
            self.prompts,
            range(len(self.prompts)),
            self._draws(),
        )
        return torch.tensor([ids.tolist() for own in found for ids in own])

    def _draws(self) -> Any:
        from dpo_lightning.evaluation.many_answers import RoundDraws

        self._turn += 1
        load = self.load
        return RoundDraws(load.answers, 1.0, load.answer_tokens, seed=1, round=self._turn)

    def check(self) -> dict[str, float]:
        """Refuses to time what does not draw from the model's distribution.

        The log-probability of a drawn token has the mean -H and a variance that are sums over the
        vocabulary; over all tokens drawn their difference, in standard errors, is near 0. And the
        noise of ours draws the same tokens from the scores of a plain forward pass.

        Raises:
            SystemExit: If they do not.
        """
        found = {}
        for name in ("ours", "copied", "transformers"):
            answers = getattr(self, name)()
            assert answers.shape == (self.load.tokens // self.load.answer_tokens, answers.shape[1])
            assert answers.shape[1] == self.load.answer_tokens
            found[name] = z_score(self._logps(answers), answers)
            if not abs(found[name]) <= _FAR:
                raise SystemExit(f"{name}: log p of what it draws is {found[name]:.1f} errors away")
        found["same_tokens"] = self._same_tokens()
        if not found["same_tokens"] >= _SAME:
            raise SystemExit(f"ours: {found['same_tokens']:.4f} of the tokens are those expected")
        return found

    def _same_tokens(self) -> float:
        """Share of our tokens that their noise draws from the scores of a plain pass."""
        import torch

        from dpo_lightning.evaluation.noise import answer_keys, draw_tokens

        answers, draws = self.ours(), self._turn
        logps = self._logps(answers)
        keys = torch.tensor(
            [
                key
                for prompt in self.prompts
                for key in answer_keys(
                    prompt, seed=1, round=draws, occurrence=0, count=self.load.answers
                )
            ]
        )
        again = [
            draw_tokens(logps[:, step], keys, step, temperature=1.0)[0]
            for step in range(self.load.answer_tokens)
        ]
        return float((torch.stack(again, 1) == answers).double().mean())

    def _logps(self, answers: Any) -> Any:
        """Next-token log-probabilities at each token of answers by a plain pass, (n, R, V)."""
        import torch

        count = self.load.answer_tokens
        prompts = torch.tensor([prompt.tolist() for prompt in self.prompts])
        rows = torch.cat([prompts.repeat_interleave(self.load.answers, 0), answers], dim=1)
        with self._flat.plain(self._model) as model, torch.no_grad():
            parts = [
                model(input_ids=part, use_cache=False, logits_to_keep=count + 1).logits[:, :-1]
                for part in rows.split(8)
            ]
        return torch.cat(parts).log_softmax(-1)


def z_score(logps: Any, tokens: Any) -> float:
    """Distance of log p of drawn tokens from its expectation, in standard errors.

    Args:
        logps: Log-probabilities that they were drawn with, (..., V).
        tokens: The tokens, (...).
    """
    drawn = logps.gather(-1, tokens[..., None])[..., 0].double()
    p = logps.double().exp()
    mean = (p * logps).sum(-1)
    variance = (p * logps.double().square()).sum(-1) - mean.square()
    return float((drawn - mean).sum() / variance.sum().sqrt())


def measure(
    arms: dict[str, Callable[[], Any]], *, rounds: int, tokens: int
) -> dict[str, dict[str, list[float]]]:
    """Tokens a second of each arm in each round, and of a second of its own on a CPU.

    The first round, which warms up, is not kept.
    """
    clocks = {"wall": time.perf_counter, "cpu": time.process_time}
    rates: dict[str, dict[str, list[float]]] = {
        clock: {name: [] for name in arms} for clock in clocks
    }
    for turn in range(rounds + 1):
        for name in [*arms][:: -1 if turn % 2 else 1]:
            begin = {clock: read() for clock, read in clocks.items()}
            arms[name]()
            if turn:
                for clock, read in clocks.items():
                    rates[clock][name].append(tokens / (read() - begin[clock]))
        if turn:
            said = "  ".join(f"{name} {own[-1]:,.0f}" for name, own in rates["wall"].items())
            print(f"round {turn}: {said} tokens/s", flush=True)
    return rates


def ratios(rates: Mapping[str, Sequence[float]]) -> dict[str, list[float]]:
    """Tokens a second of the ways of ours over transformers', with 95% intervals, by rounds."""
    found = {}
    for name in rates:
        if name != "transformers":
            ratio = Ratio.of(rates[name], rates["transformers"])
            found[name] = [ratio.value, ratio.low, ratio.high]
    return found


def table(report: dict[str, Any]) -> str:
    """The results as Markdown."""
    machine, load = report["machine"], report["load"]
    busy = report["load_average"] > _QUIET
    beside = f", beside other work, load {report['load_average']:.0f}" if busy else ""
    names = {
        "ours": "here: a prompt's keys once for all answers",
        "copied": "the same loop on transformers' cache, its keys copied for each answer",
        "transformers": "transformers' `generate`",
    }
    lines = [
        f"{load['answers']} answers of {load['answer_tokens']} tokens to each of "
        f"{load['prompts']} prompts of {load['prompt_tokens']}, {report['rounds']} rounds "
        f"({machine['date']}, {machine['cpu']}, {machine['cores']} cores, threads: "
        f"{machine['threads']}, transformers {machine['versions']['transformers']}{beside}):",
        "",
        "| | tokens/s | over `generate` | 95% | over it by CPU seconds | 95% |",
        "|---|---|---|---|---|---|",
    ]
    for name, words in names.items():
        rate = statistics.median(report["tokens_per_second"]["wall"][name])
        cells = [words, f"{rate:,.0f}"]
        for clock in ("wall", "cpu"):
            if name in report["ratios"][clock]:
                value, low, high = report["ratios"][clock][name]
                cells += [f"{value:.2f}", f"{low:.2f}–{high:.2f}"]
            else:
                cells += ["–", "–"]
        lines.append(f"| {' | '.join(cells)} |")
    check = report["check"]
    lines += [
        "",
        "Before anything was timed: log p of what each draws is "
        + ", ".join(f"{check[name]:+.1f}" for name in names)
        + " standard errors from its expectation, and the noise of ours draws "
        f"{math.floor(1000 * check['same_tokens']) / 10:.1f}% of its tokens from the scores of a "
        "plain forward pass too.",
    ]
    return "\n".join(lines) + "\n"


def put_table(page: Path, text: str) -> None:
    """Puts a table between its marks."""
    before, _, rest = page.read_text().partition(MARKS[0])
    _, _, after = rest.partition(MARKS[1])
    page.write_text(f"{before}{MARKS[0]}\n\n{text}\n{MARKS[1]}{after}")


def main() -> None:
    """Runs the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=7, help="of each way; two at least")
    parser.add_argument("--threads", type=int, default=min(2, os.cpu_count() or 1))
    parser.add_argument("--size", choices=tuple(SIZES), default="small")
    parser.add_argument("--out", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    if arguments.size != "small" and arguments.out == RESULTS:
        parser.error(f"--size {arguments.size}: name another file with --out than what is kept")
    import torch

    average = os.getloadavg()[0]
    torch.set_num_threads(arguments.threads)
    load = Load(size=arguments.size)
    with tempfile.TemporaryDirectory(prefix="dpo-bench-") as folder:
        # The scores of all tokens of all answers are large.
        check = Arms(Path(folder), replace(load, prompts=2)).check()
        print(f"drawn alike: {check}", flush=True)
        arms = Arms(Path(folder), load)
        rates = measure(
            {name: getattr(arms, name) for name in ("ours", "copied", "transformers")},
            rounds=arguments.rounds,
            tokens=load.tokens,
        )
    report = {
        "machine": describe_machine(arguments.threads),
        "model": SIZES[arguments.size].describe(),
        "load": {name: getattr(load, name) for name in Load.__dataclass_fields__},
        "load_average": average,
        "rounds": arguments.rounds,
        "check": check,
        "tokens_per_second": rates,
        "ratios": {clock: ratios(own) for clock, own in rates.items()},
    }
    arguments.out.write_text(json.dumps(report, indent=1) + "\n")
    if arguments.out == RESULTS:
        put_table(HERE / "README.md", table(report))
    print(table(report))


if __name__ == "__main__":
    main()
