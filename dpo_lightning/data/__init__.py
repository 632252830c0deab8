"""Preference data: from files of rows to the flat batches of one optimizer step.

In: a file or the id of a data set, a tokenizer, limits. Out: groups of token ids, step plans and
batches; and every row that was dropped, with its reason.
"""
