"""The packages of the wheel; all else about the project is in ``pyproject.toml``.

The config files stand in ``conf/``, where people look for them, and go into the wheel as
``dpo_lightning/conf``. ``dpo_lightning.settings.schema.CONF`` finds them in either place.
"""

from setuptools import find_namespace_packages, find_packages, setup

setup(
    packages=[
        *find_packages(include=["dpo_lightning", "dpo_lightning.*"]),
        # Hydra's namespace for plugins has no __init__.py.
        *find_namespace_packages(include=["hydra_plugins", "hydra_plugins.*"]),
        "dpo_lightning.conf",
    ],
    package_dir={"dpo_lightning.conf": "conf"},
    package_data={
        "dpo_lightning": [
            *("py.typed", "assets/tiny_llama/*"),
            *("run/inspect/templates/*", "run/page/templates/*"),
            "sweeps/report/templates/*",
        ],
        "dpo_lightning.conf": ["*.yaml", "*/*.yaml", "*/*/*.yaml"],
    },
)
