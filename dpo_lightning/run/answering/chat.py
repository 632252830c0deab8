"""The command ``chat``: a conversation with a policy and its reference, side by side."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, TextIO

from dpo_lightning.data.questions import typed_question
from dpo_lightning.errors import UserError
from dpo_lightning.run.answering.draws import DRAW_FLAGS, read_at_beta, read_draws
from dpo_lightning.run.answering.subject import OF_ANSWERS, AnsweringPolicy, subject_of
from dpo_lightning.run.beta_path import place_of
from dpo_lightning.run.framed import answer_alone, said_help
from dpo_lightning.run.guard import guarded
from dpo_lightning.run.opened import open_named
from dpo_lightning.run.words import Grammar, Words, read_words
from dpo_lightning.settings.generation import GenerationConfig

if TYPE_CHECKING:
    from dpo_lightning.evaluation.keyed import Sampling
    from dpo_lightning.run.answering.answerer import Answerer

_HELP = """\
usage: {program} RUN [--at-beta BETA] [settings]
       {program} MODEL [--reference MODEL] [settings]

Talks to a trained policy and to its reference: both answer each line, each goes on with its own
conversation. RUN is a run's folder; MODEL a folder with a model or a LoRA adapter, or a hub id,
which without --reference answers alone. /reset starts over, /quit or Ctrl-D quits.

  --at-beta BETA       one more answer, as the policy would at another beta
  --prompts chat|text  lines as a user's turns through the chat template, or each as it is; default
                       chat if the model has a template
  --temperature T      default 1; 0 takes the likeliest token
  --top-p P            draw from the likeliest tokens that have this share; default 1, all
  --max-new-tokens N   longest answer; default 256
  --seed N             default 1; the same words get the same answer

Settings may be plugins, data.chat_template and its options, and of trainer accelerator, devices,
precision and threads. Without a terminal a line of input gets a line of output from each model."""

_GRAMMAR = Grammar(
    "chat",
    flags=(*DRAW_FLAGS, "--prompts", "--reference"),
    switches=(),
    settings=tuple(key for key in OF_ANSWERS if key not in ("generation", "evaluation.batch_size")),
)
_LONGEST = 256
_QUIT = ("/quit", "/exit")
_RESET = "/reset"


@dataclass(slots=True)
class Speaker:
    """One of those who answer.

    Attributes:
        name: Its name.
        lam: Its place: 0 is the reference, 1 the policy.
        said: The conversation so far, with its own answers.
    """

    name: str
    lam: float
    said: list[Mapping[str, str]] = field(default_factory=list)


def main(argv: Sequence[str] | None = None) -> int:
    """Talks until the input ends.

    Args:
        argv: The policy, flags and settings; None takes the process's own.

    Returns:
        0, or 2 where the words or the policy are wrong.
    """
    return guarded(_main, list(sys.argv[1:] if argv is None else argv))


def _main(argv: list[str]) -> int:
    if said_help(argv, _HELP, "chat"):
        return 0
    words = read_words(argv, _GRAMMAR)
    words.only_name("chat")
    mode = words.one("--prompts")
    if mode not in (None, "chat", "text"):
        raise UserError(f"--prompts {mode}: it is chat or text")
    draws = read_draws(words, _LONGEST)
    out = sys.stdout
    with answer_alone():
        subject, speakers = _speakers(words)
        # Here, because they import torch: by now every setting is checked.
        from dpo_lightning.evaluation.keyed import Sampling
        from dpo_lightning.run.answering.answerer import answering

        sampling = Sampling(draws.temperature, draws.top_p, draws.max_new_tokens, draws.seed)
        with answering(subject) as answerer:
            chat = mode == "chat" or (mode is None and answerer.has_template)
            if not chat:
                print("each line is a prompt by itself, as it is typed", file=sys.stderr)
            talk = Talk(answerer, speakers, sampling, keeps=chat)
            talk_on(talk, sys.stdin, out)
    return 0


def _speakers(words: Words) -> tuple[AnsweringPolicy, list[Speaker]]:
    """Those who answer, in the order of their columns."""
    reference, beta = words.one("--reference"), read_at_beta(words)
    opened = open_named(words.names[0], reference=reference, alone=beta is None)
    has_reference = opened.kind != "model" or reference is not None
    subject = subject_of(opened, words.settings, needs_reference=has_reference)
    # Both models are here, whoever else drew the run's answers.
    subject = replace(subject, config=replace(subject.config, generation=GenerationConfig()))
    speakers = [Speaker("policy", 1.0)]
    if beta is not None:
        lam = place_of(beta, subject.config, trained=subject.trained_beta, flag="--at-beta=")
        speakers.append(Speaker(f"at beta {beta:g}", lam))
    if has_reference:
        speakers.append(Speaker("reference", 0.0))
    else:
        print("no --reference: the model answers alone", file=sys.stderr)
    return subject, speakers


class Talk:
    """A conversation with several models.

    Args:
        answerer: Has the models.
        speakers: Those who answer.
        sampling: How answers are drawn.
        keeps: True if lines are turns of a conversation; else each is a prompt by itself.
    """

    def __init__(
        self, answerer: Answerer, speakers: Sequence[Speaker], sampling: Sampling, *, keeps: bool
    ) -> None:
        self._answerer = answerer
        self._speakers = speakers
        self._sampling = sampling
        self._keeps = keeps

    @property
    def names(self) -> list[str]:
        """Names of those who answer."""
        return [speaker.name for speaker in self._speakers]

    def reset(self) -> None:
        """Forgets what was said."""
        for speaker in self._speakers:
            speaker.said.clear()

    def answers(self, line: str) -> list[str]:
        """The answer of each to a line; what could not be asked is not remembered.

        Args:
            line: What was typed.

        Raises:
            UserError: If there is no room for an answer, or the template refuses it.
        """
        asked: list[Any] = []
        for speaker in self._speakers:
            turn = {"role": "user", "content": line}
            prompt = [*speaker.said, turn] if self._keeps else line
            asked.append((speaker, turn, typed_question(prompt, "chat")))
        prompts = self._answerer.encode([question for _, _, question in asked])
        found = []
        for (speaker, turn, _), ids in zip(asked, prompts, strict=True):
            [answer] = self._answerer.answer([ids], self._sampling, lam=speaker.lam)
            found.append((speaker, turn, answer.text))
        for speaker, turn, text in found:
            if self._keeps:
                speaker.said += [turn, {"role": "assistant", "content": text}]
        return [text for _, _, text in found]


def talk_on(talk: Talk, lines: TextIO, out: TextIO) -> None:
    """Answers lines until they end.

    Args:
        talk: The conversation.
        lines: What is typed.
        out: Where answers go: a table on a terminal, else a line for each.
    """
    show = _table(out) if out.isatty() else _plain(out)
    for line in _typed_lines(lines):
        text = line.strip()
        if text in _QUIT:
            return
        if text == _RESET:
            talk.reset()
            print("begun anew", file=sys.stderr, flush=True)
            continue
        if not text:
            continue
        try:
            answers = talk.answers(text)
        except UserError as error:
            print(f"{error} ({_RESET} starts over)", file=sys.stderr, flush=True)
            continue
        show(talk.names, answers)


def _typed_lines(lines: TextIO) -> Iterator[str]:
    """Lines as they come; on a terminal behind a prompt, with keys that edit them."""
    if not lines.isatty():
        yield from lines
        return
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401
    while True:
        try:
            # It writes to standard output, which is standard error's here.
            print("> ", end="", file=sys.stderr, flush=True)
            line = lines.readline()
        except EOFError:
            return
        if not line:
            print(file=sys.stderr)
            return
        yield line


Show = Callable[[Sequence[str], Sequence[str]], None]


def _table(out: TextIO) -> Show:
    from rich.console import Console
    from rich.table import Table

    console = Console(file=out, markup=False)

    def show(names: Sequence[str], answers: Sequence[str]) -> None:
        table = Table(expand=True)
        for name in names:
            table.add_column(name, ratio=1, overflow="fold")
        table.add_row(*answers)
        console.print(table)

    return show


def _plain(out: TextIO) -> Show:
    def show(names: Sequence[str], answers: Sequence[str]) -> None:
        for name, answer in zip(names, answers, strict=True):
            # A line each, whatever the answer holds.
            print(f"{name}: {' '.join(answer.split())}", file=out, flush=True)

    return show
