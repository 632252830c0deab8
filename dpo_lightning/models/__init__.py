"""Language models: loading, attention over groups, scoring, adapters, shards.

In: folders or hub ids, batches of groups. Out: models that are ready to train, and the
log-probability of each response.
"""
