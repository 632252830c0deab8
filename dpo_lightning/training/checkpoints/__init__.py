"""Checkpoints: written durably, found again, and what makes a resumed run equal to the bit.

In: the state of a trainer. Out: files with a manifest, of which none that is damaged is taken.
"""
