"""The command ``push``: an exported model goes to a repository on the hub, private by default."""

from __future__ import annotations

import glob
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dpo_lightning.data.source_names import is_hub_id
from dpo_lightning.errors import UserError
from dpo_lightning.run.framed import answer_alone, print_answer
from dpo_lightning.run.guard import guarded
from dpo_lightning.run.share.contents import CARD, Contents, contents_of, in_words
from dpo_lightning.run.share.words import ShareParser, find_export
from dpo_lightning.settings.credentials import redact

_ABOUT = """\
Uploads the policy of a run, or a folder that `export` wrote, to a repository on the hub. It is
private unless --public is given. --dry-run shows what would be uploaded and contacts no server. The
token is that of `hf auth login` or of HF_TOKEN in the environment; it is written nowhere."""


def main(argv: Sequence[str] | None = None) -> int:
    """Uploads a run's policy.

    Args:
        argv: The run's folder and flags; None takes the process's own.

    Returns:
        0, or 2 where the words or the run are wrong, or the hub refuses.
    """
    return guarded(_main, list(sys.argv[1:] if argv is None else argv))


def _main(argv: list[str]) -> int:
    parser = ShareParser("push", _ABOUT)
    parser.add_argument("--repo", required=True, help="owner/name")
    parser.add_argument("--public", action="store_true", help="let everybody see it")
    parser.add_argument("--dry-run", action="store_true", help="upload nothing, show what would be")
    parser.add_argument("--json", action="store_true", help="print one object")
    words = parser.read(argv)
    if "/" not in words.repo or not is_hub_id(words.repo):
        raise UserError(f"--repo {words.repo}: a repository is named owner/name")
    exported = find_export(words.run)
    contents = contents_of(exported.folder)
    url = None
    if not words.dry_run:
        with answer_alone():
            url = _upload(exported.folder, contents, words.repo, public=words.public)
    card = exported.folder / CARD
    found = {
        "repo": words.repo,
        "private": not words.public,
        "files": contents.entries(),
        "bytes": contents.total,
        "left_out": contents.left_out,
        "card": card.read_text() if card.is_file() else None,
        "url": url,
    }
    print_answer(found, as_json=words.json, show=_show)
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
