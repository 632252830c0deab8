"""Attention of answers that share their prompt's keys, beside a loop over every query."""

import pytest
import torch

from dpo_lightning.models.decoding import Decoding

CPU = torch.device("cpu")
HEADS, KEY_HEADS, SIZE, WIDTH = 4, 2, 8, 6


def by_hand(query, keys, values, window, scaling):
    """One query (heads, d) over keys (key heads, n, d), the last of which is its own."""
    output = []
    for head in range(len(query)):
        shared = head // (len(query) // len(keys))
        seen = slice(0 if window is None else max(0, keys.shape[1] - window), None)
        weights = (keys[shared, seen] @ query[head] * scaling).softmax(0)
        output.append(weights @ values[shared, seen])
    return torch.stack(output)


def qkv(draw: torch.Generator, rows: int, tokens: int) -> tuple[torch.Tensor, ...]:
    shapes = ((HEADS, SIZE), (KEY_HEADS, SIZE), (KEY_HEADS, WIDTH))
    return tuple(torch.randn(rows, heads, tokens, d, generator=draw) for heads, d in shapes)


@pytest.mark.parametrize("window", [None, 5, 60])
@pytest.mark.parametrize(
    ("lengths", "owners"), [((7, 7), (0, 0, 1, 1)), ((9, 2, 4), (0, 0, 0, 1, 2, 2))]
)
def test_each_query_sees_its_prompt_and_its_own_answer(window, lengths, owners):
    """Two layers and 70 tokens, past two growths; an answer ends, then all of the last prompt."""
    draw = torch.Generator().manual_seed(1)
    scaling = 0.3
    decoding = Decoding(lengths, CPU)
    prompts = []
    for _ in range(2):
        query, key, value = qkv(draw, len(lengths), max(lengths))
        found = decoding.attend(query, key, value, window, scaling)
        for row, length in enumerate(lengths):
            for t in range(length):
                past = (key[row, :, : t + 1], value[row, :, : t + 1])
                expected = by_hand(query[row, :, t], *past, window, scaling)
                torch.testing.assert_close(found[row, t], expected, rtol=1e-4, atol=1e-5)
        prompts.append((key, value))
    assert decoding.layers == 2
    decoding.begin(owners)
    past = [
        [[x[owner, :, : lengths[owner]] for x in layer] for owner in owners] for layer in prompts
    ]
    rows = list(range(len(owners)))
    for step in range(70):
        if step in (3, 40):
            kept = rows[1:] if step == 3 else [row for row in rows if owners[row] != owners[-1]]
            decoding.keep([rows.index(row) for row in kept])
            rows = kept
        decoding.advance()
        assert decoding.positions.tolist() == [lengths[owners[row]] + step for row in rows]
        for layer in range(2):
            query, key, value = qkv(draw, len(rows), 1)
            found = decoding.attend(query, key, value, window, scaling)
            for place, row in enumerate(rows):
                own = past[layer][row]
                for which, new in enumerate((key, value)):
                    own[which] = torch.cat([own[which], new[place]], dim=1)
                expected = by_hand(query[place, :, 0], *own, window, scaling)
                torch.testing.assert_close(found[place, 0], expected, rtol=1e-4, atol=1e-5)


def test_keys_of_a_prompt_are_there_once():
    """Eight answers to each prompt: still two rows of keys, and one when its answers have ended."""
    draw = torch.Generator().manual_seed(1)
    decoding = Decoding((5, 5), CPU)
    decoding.attend(*qkv(draw, 2, 5), None, 1.0)
    decoding.begin([0] * 8 + [1] * 8)
    [layer] = decoding._layers
    assert layer.prompt_keys.shape == (2, KEY_HEADS, 5, SIZE)
    decoding.keep([9, 12])
    assert layer.prompt_keys.shape == (1, KEY_HEADS, 5, SIZE)
    assert layer.prompt_values.shape == (1, KEY_HEADS, 5, WIDTH)


def test_under_autocast_keys_are_kept_in_its_type():
    """Else all of them would be cast anew for each token."""
    draw = torch.Generator().manual_seed(1)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        decoding = Decoding((5,), CPU)
        decoding.attend(*qkv(draw, 1, 5), None, 1.0)
        decoding.begin([0, 0])
        decoding.advance()
        found = decoding.attend(*qkv(draw, 2, 1), None, 1.0)
    [layer] = decoding._layers
    assert layer.prompt_keys.dtype == layer.own(0, 1)[0].dtype == found.dtype == torch.bfloat16
