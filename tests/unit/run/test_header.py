"""Header of a run: what it says of the rows."""

from dpo_lightning.data.splits import PreparedData
from dpo_lightning.run.header import _counts
from tests.support.reference_caches import pair


def test_a_sample_of_the_held_out_rows_is_said():
    rows = [pair((1,), (2,), (3,))] * 6
    data = PreparedData(train=rows[:2], eval=rows)
    assert _counts(data) == "2 training and 6 evaluation rows"
    assert data.counts()["evaluated_groups"] == data.counts()["eval_groups"] == 6
    data.evaluated = [0, 4, 5]
    assert _counts(data) == (
        "2 training and 6 evaluation rows, a fixed sample of 3 of these is evaluated"
    )
    assert (data.counts()["eval_groups"], data.counts()["evaluated_groups"]) == (6, 3)
