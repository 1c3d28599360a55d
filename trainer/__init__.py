"""Training MPT models: configuration, data, sharding, checkpoints, the loop."""

from trainer.config import TrainConfig, load_config, validate
from trainer.errors import InputError
from trainer.run import run

__all__ = ["InputError", "TrainConfig", "load_config", "run", "validate"]
