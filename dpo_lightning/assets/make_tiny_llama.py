"""Makes the bundled tiny Llama and its tokenizer: `python -m dpo_lightning.assets.make_tiny_llama`.

The language of the controlled task has an *author*: for each prompt a Markov chain over the words,
which stops after a word with a small probability and never before the first. The model is trained
by maximum likelihood on it. Paths are sampled, and at every step of a path the model learns the
chain's whole next-token distribution, which says the same as many samples of the token would.

From then on the model, not the author, is the reference of the task. The same command gives the
same weights on the same machine, and the same language within rounding of training elsewhere.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import Tensor
from transformers import (
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    get_cosine_schedule_with_warmup,
)

from dpo_lightning.assets import BUNDLED_MODEL
from dpo_lightning.data.controlled import END, MAX_TOKENS, PROMPTS, WORDS, ControlledTask

STEPS = 300
PATHS_PER_PROMPT = 8
LEARNING_RATE = 1e-2
SEED = 1

SPREAD = 1.2
"""Standard deviation of the chain's logits: how decided the author is."""
STOP = 0.05
"""The median probability of stopping after a word."""


def author_chain() -> Tensor:
    """The author's next-token probabilities: (8 prompts, 9 states, 9 tokens), float64.

    State 0 is the start, state i the word of id i before. The logits of the words are a sum of
    what the last word, the prompt's first and its second word say.
    """
    generator = torch.Generator().manual_seed(SEED)
    states = len(WORDS) + 1
    by_state, by_first, by_second = (
        torch.randn(states, len(WORDS), generator=generator, dtype=torch.float64) for _ in range(3)
    )
    spread = torch.randn(len(PROMPTS), states, 1, generator=generator, dtype=torch.float64)
    stop = (STOP * (spread / 2).exp()).clamp(max=0.5)
    stop[:, 0] = 0.0
    first, second = ControlledTask().prompt_ids[:, 1:].T
    logits = by_state + (by_first[first] + by_second[second])[:, None]
    words = (logits * SPREAD / 3**0.5).softmax(-1)
    return torch.cat([stop, (1 - stop) * words], dim=-1)


def author_logps() -> Tensor:
    """The author's log-probability of every outcome, (8, 4681), float64; -inf for the empty one."""
    outcomes = ControlledTask().outcomes
    lengths = torch.tensor([len(y) for y in outcomes])
    tokens = torch.tensor([(*y, *(END,) * (MAX_TOKENS - len(y))) for y in outcomes])
    chain = author_chain().log()
    state = torch.zeros(len(outcomes), dtype=torch.int64)
    total = torch.zeros(len(PROMPTS), len(outcomes), dtype=torch.float64)
    for t in range(MAX_TOKENS):
        total += torch.where(lengths > t, chain[:, state, tokens[:, t]], 0.0)
        state = tokens[:, t]
    return total


def train(steps: int = STEPS) -> LlamaForCausalLM:
    """A tiny Llama that speaks the author's language; deterministic on one thread."""
    config = LlamaConfig(
        vocab_size=len(WORDS) + 1,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=16,
        tie_word_embeddings=True,
        initializer_range=0.06,
        bos_token_id=END,
        eos_token_id=END,
        pad_token_id=END,
        dtype=torch.float32,
    )
    prompt_ids = ControlledTask().prompt_ids.repeat(PATHS_PER_PROMPT, 1)
    prompt = torch.arange(len(PROMPTS)).repeat(PATHS_PER_PROMPT)
    chain = author_chain().float()
    # The model's first weights come from the global generator; the caller's draws stay its own.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        model = LlamaForCausalLM(config)
        optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=0.0)
        schedule = get_cosine_schedule_with_warmup(optimizer, steps // 10, steps)
        for _ in range(steps):
            words, targets, weights = _paths(chain, prompt)
            input_ids = torch.cat([prompt_ids, words[:, :-1]], dim=1)
            logps = model(input_ids=input_ids).logits[:, prompt_ids.shape[1] - 1 :].log_softmax(-1)
            loss = -((targets * logps).sum(-1) * weights).sum(1).mean()
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
    model.generation_config = GenerationConfig(
        bos_token_id=END,
        eos_token_id=END,
        pad_token_id=END,
        do_sample=True,
        max_new_tokens=MAX_TOKENS,
    )
    model.eval()
    return model


def _paths(chain: Tensor, prompt: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Sampled four-word paths of the chain.

    Stopping is not sampled: a path goes on, and each step weighs as much as the path was likely to
    get there.

    Args:
        chain: (8, 9, 9), floating.
        prompt: (B,), int64.

    Returns:
        The words (B, 4), int64; before each of them the chain's distribution (B, 4, 9) and the
        probability of not having stopped (B, 4).
    """
    state = torch.zeros_like(prompt)
    alive = torch.ones(len(prompt))
    words, targets, weights = [], [], []
    for _ in range(MAX_TOKENS):
        target = chain[prompt, state]
        targets.append(target)
        weights.append(alive)
        alive = alive * (1 - target[:, END])
        state = torch.multinomial(target[:, END + 1 :], 1)[:, 0] + 1
        words.append(state)
    return torch.stack(words, 1), torch.stack(targets, 1), torch.stack(weights, 1)


def tokenizer() -> PreTrainedTokenizerFast:
    """Words between white space, `</s>` in front of the text.

    There is no unknown token, so that a word of another language is an error and never a silence.
    """
    vocabulary = {"</s>": END, **{word: i + 1 for i, word in enumerate(WORDS)}}
    rust = Tokenizer(models.WordLevel(vocabulary))
    rust.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    rust.post_processor = processors.TemplateProcessing(
        single="</s> $A", pair="</s> $A $B", special_tokens=[("</s>", END)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=rust,
        bos_token="</s>",
        eos_token="</s>",
        pad_token="</s>",
        model_max_length=16,
        clean_up_tokenization_spaces=False,
    )


def make(out: Path, steps: int = STEPS) -> float:
    """Trains, writes the model folder, and returns KL(author || model) in nats, over the prompts.

    The files are complete before they replace those of an earlier run.
    """
    model = train(steps)
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent) as scratch:
        model.save_pretrained(scratch)
        tokenizer().save_pretrained(scratch)
        for file in sorted(Path(scratch).iterdir()):
            file.replace(out / file.name)
    author = author_logps()
    learned = ControlledTask().outcome_logps(model)
    possible = author.isfinite()
    return torch.where(possible, author.exp() * (author - learned), 0.0).sum(1).mean().item()


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description="Make the bundled tiny Llama and its tokenizer.")
    parser.add_argument("--out", type=Path, default=BUNDLED_MODEL, help="the folder to write")
    parser.add_argument("--steps", type=int, default=STEPS, help="training steps")
    args = parser.parse_args()
    torch.set_num_threads(1)  # the order of summation, and with it the weights, depends on it
    divergence = make(args.out, args.steps)
    print(f"{args.out}: KL(author || model) = {divergence:.5f} nats")


if __name__ == "__main__":
    main()
