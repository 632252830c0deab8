"""The command ``push``: an exported model goes to a repository on the hub, private by default."""

from __future__ import annotations

import glob
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dpo_lightning.data.source_names import is_hub_id
from dpo_lightning.errors import UserError
from dpo_lightning.run.framed import answer_alone, print_answer, said_help
from dpo_lightning.run.guard import guarded
from dpo_lightning.run.share.contents import CARD, Contents, contents_of, in_words
from dpo_lightning.run.share.words import find_export, read_shared
from dpo_lightning.run.words import Grammar
from dpo_lightning.settings.credentials import redact

_HELP = """\
usage: {program} RUN --repo OWNER/NAME [--public] [--dry-run] [--json]

Uploads the policy of a run, or a folder that `export` wrote, to a repository on the hub. It is
private unless --public is given. --dry-run shows what would be uploaded and contacts no server. The
token is that of `hf auth login` or of HF_TOKEN in the environment; it is written nowhere.

  --repo OWNER/NAME  the repository, which is made if it is not there
  --public           let everybody see it
  --dry-run          upload nothing, show what would be
  --json             print one object, and all else on stderr"""

_GRAMMAR = Grammar(
    "push",
    flags=("--repo",),
    switches=("--public", "--dry-run", "--json"),
    settings=(),
    others="it has no settings",
)


def main(argv: Sequence[str] | None = None) -> int:
    """Uploads a run's policy.

    Args:
        argv: The run's folder and flags; None takes the process's own.

    Returns:
        0, or 2 where the words or the run are wrong, or the hub refuses.
    """
    return guarded(_main, list(sys.argv[1:] if argv is None else argv))


def _main(argv: list[str]) -> int:
    if said_help(argv, _HELP, "push"):
        return 0
    words = read_shared(argv, _GRAMMAR)
    run, repo = words.only_name("push", wanted="one run"), words.one("--repo")
    if repo is None:
        raise UserError("--repo: no repository is named; add --repo <owner>/<name>")
    if "/" not in repo or not is_hub_id(repo):
        raise UserError(f"--repo {repo}: a repository is named owner/name")
    public = "--public" in words.switches
    exported = find_export(run)
    contents = contents_of(exported.folder)
    url = None
    if "--dry-run" not in words.switches:
        with answer_alone():
            url = _upload(exported.folder, contents, repo, public=public)
    card = exported.folder / CARD
    found = {
        "repo": repo,
        "private": not public,
        "files": contents.entries(),
        "bytes": contents.total,
        "left_out": contents.left_out,
        "card": card.read_text() if card.is_file() else None,
        "url": url,
    }
    print_answer(found, as_json="--json" in words.switches, show=_show)
    return 0


def _show(found: Mapping[str, Any]) -> None:
    went = "went" if found["url"] else "would go"
    who = "private" if found["private"] else "public"
    for file in found["files"]:
        print(f"{file['name']:<28} {in_words(file['bytes']):>10}")
    print(f"{in_words(found['bytes'])} {went} to {found['repo']}, {who}")
    if found["left_out"]:
        print(f"left out: {', '.join(found['left_out'])}")
    if found["url"]:
        print(found["url"])
        return
    print(f"\n{found['card'] or 'There is no card.'}\nDry run: nothing was uploaded.")


def _upload(folder: Path, contents: Contents, repo: str, *, public: bool) -> str:
    """Makes the repository if need be, and uploads; returns its address.

    Raises:
        UserError: If the hub refuses, or the repository shows more than was said.
    """
    from huggingface_hub import HfApi

    try:
        api = HfApi()
        url = str(api.create_repo(repo, private=not public, exist_ok=True))
        if not public and not api.repo_info(repo).private:
            raise UserError(
                f"--repo {repo}: that repository is public already, so everybody would see it; "
                "--public says that this is meant"
            )
        api.upload_folder(
            repo_id=repo,
            folder_path=str(folder),
            # Patterns, of which each means one file.
            allow_patterns=[glob.escape(name) for name in contents.sizes],
            commit_message="Trained with dpo-lightning",
        )
    except UserError:
        raise
    except Exception as error:  # of its many libraries; all mean that it is not there
        reason = redact(" ".join(str(error).split()))[:300]
        raise UserError(
            f"--repo {repo}: the hub did not take it ({reason}); `hf auth login` or HF_TOKEN gives "
            "a token that may write there"
        ) from error
    return url
