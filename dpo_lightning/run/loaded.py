"""A named policy and its reference in memory: the weights of :mod:`dpo_lightning.run.opened`."""

from __future__ import annotations

from dataclasses import replace

from dpo_lightning.models.adapter_files import read_adapter
from dpo_lightning.models.loading import load_config, load_model
from dpo_lightning.models.source import ModelSource
from dpo_lightning.reference.pair import Models, ReferenceSettings, load_models
from dpo_lightning.run.adapter_start import adapter_settings
from dpo_lightning.run.opened import Opened
from dpo_lightning.settings.schema import Config


def load_opened(
    opened: Opened, config: Config, source: ModelSource, *, kind: str, needed: bool
) -> Models:
    """Loads a policy as it was trained, and how its reference is to be had.

    Args:
        opened: The policy.
        config: Its settings, from :func:`~dpo_lightning.run.opened.compose_opened`.
        source: The model that these start from.
        kind: ``reference``, such as ``auto``.
        needed: True if the reference is compared with.

    Raises:
        UserError: If the weights are gone, or do not fit.
    """
    reference = config.reference
    adapters = adapter_settings(config, source)
    if adapters is not None and opened.run is not None:
        assert opened.adapter is not None
        # What the run started from is still what it is compared with.
        adapters = replace(adapters, start=read_adapter(opened.adapter, key="run"))
    if adapters is not None:
        adapters = replace(adapters, dropout=0.0)
    models = load_models(
        source,
        ReferenceSettings(
            kind=kind,
            pretrained=reference.pretrained,
            revision=reference.revision,
            needed=needed,
        ),
        seed=config.seed,
        adapters=adapters,
    )
    if adapters is None and opened.run is not None:
        export = str(opened.weights)
        trained = load_model(export, load_config(export, key="run"), key="run", dtype=source.dtype)
        models.scorer.prepare(trained)
        models = replace(models, policy=trained)
    # It is not what it started from any more, whatever that was.
    return replace(models, starts_from_reference=False)
