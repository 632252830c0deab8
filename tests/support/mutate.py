"""Breaks of the code, one at a time, and the test that must go red: ``make mutations``.

``tests/mutations.toml`` holds them: a file, text that stands in it once, what is put in its place,
and a test. Each is applied to a copy of the working tree, where that test alone is run. A break
that no test notices, one whose text stands nowhere or twice, and a test that fails without it are
red.

    make mutations ARGS="training/module.py"    # those of a file, or of a test, by a part
"""

from __future__ import annotations

import concurrent.futures
import os
import queue
import shutil
import subprocess
import sys
import tempfile
import time
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tests.support.warm import ROOT, Order, WarmProcess

LIST = Path("tests") / "mutations.toml"

# Of what tests import, what is not this project's: that has to come from the copy. Not pyarrow,
# which starts a thread.
MODULES = (
    *("torch", "lightning.pytorch", "transformers", "peft", "hypothesis.strategies"),
    *("hydra.core.utils", "hydra._internal.hydra", "safetensors.numpy", "pytest"),
)
WORKERS = 2
SECONDS = 300


@dataclass(frozen=True, slots=True)
class Mutation:
    """A break of the code.

    Attributes:
        file: The file, from the root of the project.
        before: Text that stands in it once.
        after: The text in its place.
        test: The node id of the test that must fail.
    """

    file: str
    before: str
    after: str
    test: str

    def problem(self, root: Path) -> str | None:
        """Reason why it is no break of this tree, if there is one."""
        path = root / self.file
        if not path.is_file():
            return "there is no such file"
        places = path.read_text().count(self.before)
        if places != 1:
            return f"its text stands there {places} times"
        return "it changes nothing" if self.before == self.after else None

    def __str__(self) -> str:
        """The file, and its first line that differs."""
        pairs = zip(self.before.splitlines(), self.after.splitlines() or [""], strict=False)
        line = next((a for a, b in pairs if a != b), self.before.splitlines()[-1])
        return f"{self.file}: {line.strip()}"


@dataclass(frozen=True, slots=True)
class Outcome:
    """The end of a mutation: ``killed``, ``survived``, or what else went wrong."""

    mutation: Mutation
    verdict: str
    seconds: float


def read_mutations(root: Path) -> list[Mutation]:
    """Reads the list of mutations of a tree.

    Raises:
        TypeError: If an entry lacks a field, or has one too many.
    """
    entries = tomllib.loads((root / LIST).read_text())["mutation"]
    return [Mutation(**entry) for entry in entries]


def copy_tree(root: Path, folder: Path) -> Path:
    """Copies the files that git knows, or would add; links the real data beside them."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=root,
        capture_output=True,
        check=True,
    )
    copy = folder / "main"
    for name in filter(None, listed.stdout.decode().split("\0")):
        source = root / name
        if source.is_file():
            (copy / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(source, copy / name)
    shared = root.parent / "shared"
    if shared.is_dir():
        (folder / "shared").symlink_to(shared)
    return copy


class Bench:
    """A copy of the tree and a warm process, in which one break at a time is tried.

    Args:
        root: The tree.
        folder: An empty one for the copy.
    """

    def __init__(self, root: Path, folder: Path) -> None:
        self.copy = copy_tree(root, folder)
        self._log = folder / "pytest.log"
        self._warm = WarmProcess(MODULES)

    def judge(self, mutation: Mutation) -> Outcome:
        """Applies a break, runs its test, and takes the break back."""
        began = time.monotonic()
        problem = mutation.problem(self.copy)
        if problem is None:
            path = self.copy / mutation.file
            text = path.read_text()
            path.write_text(text.replace(mutation.before, mutation.after))
            try:
                verdict = {0: "survived", 1: "killed"}.get(
                    code := self.test([mutation.test]), f"pytest ended with {code}"
                )
            finally:
                path.write_text(text)
        else:
            verdict = problem
        return Outcome(mutation, verdict, time.monotonic() - began)

    def test(self, tests: Sequence[str]) -> int:
        """Runs tests in the copy; returns pytest's exit code, 1 where they took too long."""
        options = ("-q", "-x", "-p", "no:cacheprovider", "-p", "no:randomly", "-m", "")
        environment = self._warm.environment | {"PYTHONDONTWRITEBYTECODE": "1"}
        order = Order(
            argv=["pytest", *options, *tests],
            environment=environment | {"PYTHONPATH": str(self.copy)},
            cwd=str(self.copy),
            session=True,
            target="pytest:console_main",
            path=[str(self.copy)],
        )
        with self._log.open("w") as log:
            pid = self._warm.start(order, log.fileno(), log.fileno())
        deadline = time.monotonic() + SECONDS * max(1, len(tests) / 20)
        while (code := self._warm.code_of(pid)) is None:
            if time.monotonic() > deadline:
                os.killpg(pid, 9)
                return 1
            time.sleep(0.02)
        return code

    @property
    def said(self) -> str:
        """The end of what pytest last wrote."""
        return self._log.read_text()[-3000:]

    def close(self) -> None:
        """Ends the warm process."""
        self._warm.close()


def show(outcomes: Sequence[Outcome]) -> None:
    """Prints a line for each, those that are red last, and how many there are of each kind."""
    for outcome in sorted(outcomes, key=lambda o: (o.verdict != "killed", o.mutation.file)):
        name = outcome.mutation.test.partition("::")[2]
        print(f"{outcome.verdict:9} {outcome.seconds:5.1f} s  {outcome.mutation}  [{name}]")
    killed = sum(outcome.verdict == "killed" for outcome in outcomes)
    print(f"{len(outcomes)} mutations: {killed} killed, {len(outcomes) - killed} not")


def main(arguments: Sequence[str]) -> int:
    """Judges all mutations, or those whose file or test holds one of the arguments.

    Returns:
        0 if every one is killed, else 1.
    """
    mutations = [
        mutation
        for mutation in read_mutations(ROOT)
        if not arguments or any(word in mutation.file + mutation.test for word in arguments)
    ]
    if not mutations:
        print(f"mutations: no file and no test of {LIST} has {' or '.join(arguments)} in its name")
        return 1
    with tempfile.TemporaryDirectory() as name:
        benches: queue.Queue[Bench] = queue.Queue()
        for number in range(WORKERS):
            folder = Path(name) / str(number)
            folder.mkdir()
            benches.put(Bench(ROOT, folder))
        first = benches.get()
        if first.test(sorted({mutation.test for mutation in mutations})):
            print(first.said)
            print("mutations: these tests do not pass as it is")
            return 1
        benches.put(first)

        def judge(mutation: Mutation) -> Outcome:
            bench = benches.get()
            try:
                return bench.judge(mutation)
            finally:
                benches.put(bench)

        with concurrent.futures.ThreadPoolExecutor(WORKERS) as pool:
            outcomes = list(pool.map(judge, mutations))
        for bench in benches.queue:
            bench.close()
    show(outcomes)
    return int(any(outcome.verdict != "killed" for outcome in outcomes))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
