"""The margin that a row asks for is part of the identity of its data."""

from dataclasses import replace

from dpo_lightning.data.splits import data_hash
from tests.support.groups import token_group


def test_the_hash_is_of_the_margins():
    group = token_group()
    hashes = {
        data_hash([group], [group]),
        data_hash([replace(group, target_margin=0.5)], [group]),
        data_hash([replace(group, target_margin=-0.5)], [group]),
        data_hash([group], [replace(group, target_margin=0.5)]),
        data_hash([replace(group, weight=0.5)], [group]),
    }
    assert len(hashes) == 5


def test_rows_without_a_margin_have_the_hash_that_they_had_before_margins():
    group = token_group()
    assert data_hash([group], []) == data_hash([replace(group, target_margin=0.0)], [])
    assert data_hash([group], [group]) == "c12ce3ab6ad902a12567fd416cf1d64a"
