"""The allocator's setting: on by itself, and the user's own where there is one."""

import pytest

from dpo_lightning.memory.segments import allocate_in_segments


def test_expandable_segments_are_on():
    environment = {"HOME": "x"}
    allocate_in_segments(environment)
    assert environment == {"HOME": "x", "PYTORCH_ALLOC_CONF": "expandable_segments:True"}


@pytest.mark.parametrize("name", ["PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"])
def test_what_the_user_has_set_stays(name: str):
    environment = {name: "max_split_size_mb:64"}
    allocate_in_segments(environment)
    assert environment == {name: "max_split_size_mb:64"}
