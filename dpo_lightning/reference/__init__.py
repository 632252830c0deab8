"""Log-probabilities of the reference: from a model in memory, or from the cache.

In: the policy's source, groups, a folder. Out: policy and reference beside each other, and groups
that hold what the reference gives their responses.
"""
