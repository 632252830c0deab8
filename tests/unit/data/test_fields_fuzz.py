"""Rows and messages with foreign fields: no text of them is lost, and nothing is raised untyped."""

import json
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from dpo_lightning.data.fields import FieldAccount
from dpo_lightning.data.forms import FORMS
from dpo_lightning.data.rows import PreferenceGroup, RowReader, Unrated
from dpo_lightning.data.texts import RowError
from tests.support.foreign_fields import Maker, lost
from tests.support.properties import examples

ROWS = 100
"""Rows of an example: the longer profile reads 40,000."""


def read(row: dict[str, Any], *, is_table: bool) -> tuple[PreferenceGroup | None, FieldAccount]:
    """The group of a row, None where the row is refused; and the account of its fields."""
    account = FieldAccount()
    reader = RowReader(columns={}, null_is_absent=is_table, account=account)
    refusal = ""
    try:
        return reader.read(row, "rows.jsonl:1"), account
    except RowError as error:
        refusal = f"{error.field}{error.problem}"
    assert refusal
    assert refusal.isprintable()
    return None, account


@settings(max_examples=examples(20))
@given(st.integers(0, 2**32), st.booleans())
def test_every_text_is_in_the_group_or_its_field_is_named(seed, is_table):
    maker = Maker(seed)
    good = 0
    for _ in range(ROWS):
        row = maker.row()
        before = json.dumps(row)
        group, account = read(row, is_table=is_table)
        assert json.dumps(row) == before
        if group is not None:
            good += 1
            assert lost(row, group, account) == [], before
            group.prompt_key.encode()
    # Otherwise the test would say little.
    assert good > ROWS / 10


@settings(max_examples=examples(20))
@given(st.integers(0, 2**32), st.sampled_from(FORMS), st.booleans())
def test_rows_of_a_form_with_any_values_are_read_or_refused(seed, form, is_table):
    maker = Maker(seed)
    for _ in range(ROWS):
        row = maker.row_of(form.needs)
        before = json.dumps(row)
        account = FieldAccount()
        reader = RowReader(
            columns={k: v for k, v in form.columns.items() if k != "conversations"},
            null_is_absent=is_table,
            account=account,
            reads=form.reads,
        )
        group = None
        try:
            made = row if form.derive is None else form.derive(row, account)
            group = reader.read(made, "rows.jsonl:1")
        except (RowError, Unrated):
            pass
        assert json.dumps(row) == before
        if group is not None:
            assert lost(row, group, account) == [], before
