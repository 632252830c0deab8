"""Where the log-probabilities of the reference come from: a model in memory, or the cache.

In: the policy's source, groups, a folder. Out: policy and reference beside each other, and groups
that hold what the reference gives their responses.
"""
