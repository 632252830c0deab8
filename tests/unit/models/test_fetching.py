"""Weights of the hub are downloaded by one bar, which knows what is there already."""

import contextlib
import functools
import http.server
import io
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest
from huggingface_hub import constants
from huggingface_hub.file_download import http_get

from dpo_lightning.models import fetching
from dpo_lightning.models.fetching import fetch_weights
from dpo_lightning.tracking.quiet import quiet_loggers

COMMIT = "c" * 40


class Shown:
    """Keeps what a phase is told."""

    def __init__(self) -> None:
        self.phases: list[tuple[str, int, str]] = []
        self.said: list[int] = []

    @contextlib.contextmanager
    def __call__(self, name, *, total, unit, done=0):
        self.phases.append((name, total, unit))
        yield self.said.append


def file(name: str, size: int, *, there: bool = False) -> SimpleNamespace:
    return SimpleNamespace(
        filename=name, file_size=size, commit_hash=COMMIT, will_download=not there
    )


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *args) -> None:
        pass


@pytest.fixture
def server(tmp_path):
    """The address of a server of two shards, of 2 and 3 MB."""
    folder = tmp_path / "served"
    folder.mkdir()
    (folder / "model-1.safetensors").write_bytes(b"a" * 2_000_000)
    (folder / "model-2.safetensors").write_bytes(b"b" * 3_000_000)
    handler = functools.partial(Quiet, directory=str(folder))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as own:
        thread = threading.Thread(target=own.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        yield f"http://127.0.0.1:{own.server_port}"
        own.shutdown()
        thread.join()


@pytest.fixture(autouse=True)
def online(monkeypatch):
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.delenv(name, raising=False)


def never(*args, **options):
    raise AssertionError("the hub was asked")


def test_all_that_is_missing_is_one_phase_in_megabytes(server, monkeypatch, capfd):
    """Shards of 2 and 3 MB, one of 7 MB is there: 5 in all, by the hub's own client; no other bar.

    It reads 2,000,000 bytes, then 3,000,000 more: at the end of the first 2 MB, of all 5 MB.
    """
    asked = []

    def listed(source, **options):
        asked.append((source, options["revision"], options["allow_patterns"], options["dry_run"]))
        return [
            file("model-1.safetensors", 2_000_000),
            file("model-0.safetensors", 7_000_000, there=True),
            file("model-2.safetensors", 3_000_000),
        ]

    def downloaded(source, name, *, revision, tqdm_class):
        assert (source, revision) == ("owner/model", COMMIT)
        target = io.BytesIO()
        http_get(f"{server}/{name}", target, tqdm_class=tqdm_class)
        sizes.append(len(target.getvalue()))
        ends.append(show.said[-1])

    sizes, ends, show = [], [], Shown()
    monkeypatch.setattr(fetching, "snapshot_download", listed)
    monkeypatch.setattr(fetching, "hf_hub_download", downloaded)
    quiet_loggers()  # as each command does
    fetch_weights("owner/model", "main", show)
    assert asked == [("owner/model", "main", ["model.safetensors", "model-*.safetensors"], True)]
    assert sizes == [2_000_000, 3_000_000]
    assert show.phases == [("download", 5, "MB")]
    assert ends == [2, 5]
    assert show.said == sorted(show.said)
    assert capfd.readouterr() == ("", "")


def test_what_is_there_or_local_or_offline_shows_nothing(tmp_path, monkeypatch):
    show = Shown()
    monkeypatch.setattr(fetching, "hf_hub_download", never)
    monkeypatch.setattr(
        fetching,
        "snapshot_download",
        lambda *_, **__: [file("model.safetensors", 9**9, there=True)],
    )
    fetch_weights("owner/model", None, show)
    monkeypatch.setattr(fetching, "snapshot_download", never)
    fetch_weights(str(tmp_path), None, show)
    fetch_weights("a/b/c", None, show)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    fetch_weights("owner/model", None, show)
    assert show.phases == []


def test_what_goes_wrong_is_left_to_loading_and_an_interrupt_is_not(monkeypatch):
    def fails(*_, **__):
        raise OSError("no such repository")

    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(fetching, "snapshot_download", fails)
    fetch_weights("owner/model", None, Shown())
    monkeypatch.setattr(fetching, "snapshot_download", interrupted)
    with pytest.raises(KeyboardInterrupt):
        fetch_weights("owner/model", None, Shown())


def test_patterns_are_of_what_transformers_loads():
    """Not the copies of a whole model in other formats, nor those in folders below."""
    import fnmatch

    def wanted(name: str) -> bool:
        return any(fnmatch.fnmatch(name, own) for own in fetching._WEIGHTS)

    names = ["model.safetensors", "model-00001-of-00002.safetensors"]
    others = ["consolidated.safetensors", "pytorch_model.bin", "onnx/model.onnx", "original/x.pth"]
    assert all(map(wanted, names))
    assert not any(map(wanted, others))
    assert Path(names[0]).suffix == ".safetensors"
