"""A tokenizer with merges, and groups through it."""

from functools import lru_cache

from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from dpo_lightning.data.records import PreferenceGroup
from dpo_lightning.data.tokens import tokenize_groups

BEGIN, END = "<|begin|>", "<|end|>"


# "ab" and then "abc" become one token, whatever part of them is the prompt's.
MERGES = (("a", "b"), ("ab", "c"), ("\u0120", "x"), ("l", "l"))


@lru_cache
def make_tokenizer(*, begins: bool = True, ends: bool = False, has_bos: bool = True):
    """A tokenizer of bytes with a few merges.

    Args:
        begins: True if it writes BOS before a text.
        ends: True if it writes EOS behind a text.
        has_bos: True if there is a BOS token at all.
    """
    pieces = [END, *([BEGIN] if has_bos else [])]
    pieces += sorted(pre_tokenizers.ByteLevel.alphabet()) + ["".join(pair) for pair in MERGES]
    backend = Tokenizer(models.BPE(vocab={p: i for i, p in enumerate(pieces)}, merges=[*MERGES]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    special = [END, *([BEGIN] if has_bos else [])]
    backend.add_special_tokens([AddedToken(piece, normalized=False) for piece in special])
    template = [*([BEGIN] if begins else []), "$A", *([END] if ends else [])]
    backend.post_processor = processors.TemplateProcessing(
        single=" ".join(template),
        special_tokens=[(piece, pieces.index(piece)) for piece in special],
    )
    bos = {"bos_token": BEGIN} if has_bos else {}
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=END, **bos)


def make_group(prompt, *responses, ranks=None, source="rows.jsonl:1"):
    ranks = tuple(range(1, len(responses) + 1)) if ranks is None else tuple(ranks)
    return PreferenceGroup(prompt, tuple(responses), ranks, 1.0, None, source)


def tokenize(*groups, tokenizer=None, max_length=1000, truncation="drop", **kwargs):
    tokenizer = tokenizer or make_tokenizer()
    return tokenize_groups(
        groups, tokenizer, max_length=max_length, truncation=truncation, **kwargs
    )


def tokenize_one(*args, tokenizer=None, max_length=1000, truncation="drop", **kwargs):
    """The only token group as lists, and what was changed."""
    result = tokenize(
        make_group(*args, **kwargs),
        tokenizer=tokenizer,
        max_length=max_length,
        truncation=truncation,
    )
    assert not result.dropped
    [group] = result.groups
    return group.prompt.tolist(), [ids.tolist() for ids in group.responses], result


_ANY = st.text(st.characters(exclude_categories=["Cs"]), max_size=8)


_MERGING = st.text("abcl x\n", max_size=8)


ANY_TEXT = st.one_of(_ANY, _MERGING)
