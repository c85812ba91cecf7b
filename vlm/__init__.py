"""The core: configuration, data, models, training, evaluation and export, usable without Prefect."""
