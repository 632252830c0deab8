"""The training itself: the module, its optimizer step, precision, ranks, stops.

In: models, objective, batches. Out: trained weights, and checkpoints by which a run goes on
to the bit.
"""
