"""Checkpoints: written durably, found again, and the state that makes a resume bit-identical.

In: the state of a trainer. Out: files with a manifest, of which none that is damaged is taken.
"""
