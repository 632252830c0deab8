"""Names of the hub ahead of a run: downloads are said, and a hub that is gone costs nothing."""

import os
import socket

from dpo_lightning.run.inputs import ask_hub


def test_what_the_cache_lacks_is_said(monkeypatch, tmp_path, caplog):
    for name in ("HF_HUB_OFFLINE", "HTTPS_PROXY", "https_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    (tmp_path / "models--owner--kept").mkdir()
    (tmp_path / "datasets--rows--kept").mkdir()
    with socket.create_server(("127.0.0.1", 0)) as server, caplog.at_level("INFO"):
        monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{server.getsockname()[1]}")
        assert ask_hub(["owner/kept", "owner/new", "rows/kept", "rows/new"])
        assert caplog.messages == ["downloading from 127.0.0.1: owner/new, rows/new"]
        caplog.clear()
        assert ask_hub(["owner/kept"])
        assert caplog.messages == []
    with caplog.at_level("INFO"):
        assert not ask_hub(["owner/new"])
    assert caplog.messages == ["127.0.0.1 does not answer: owner/new from the local cache"]
    assert os.environ["HF_HUB_OFFLINE"] == "1"
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert not ask_hub(["owner/new"])
