"""Preference data: from files of rows to the flat batches of one optimizer step."""
