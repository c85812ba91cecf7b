"""One configuration tree; every default is written here, once."""

from vlm.config.data import BUILTIN_DATASET, BoxConfig, ColumnMapping, DataConfig, SourceConfig, SplitConfig
from vlm.config.distributed import DistributedConfig
from vlm.config.evaluate import EvaluateConfig, SubjectConfig
from vlm.config.evaluation import EvaluationConfig, ExportConfig, GenerationConfig
from vlm.config.model import BUILTIN_MODEL, LoraConfig, ModelConfig
from vlm.config.run import RunConfig, RuntimeConfig, TrackingConfig
from vlm.config.training import TrainingConfig

__all__ = [
    "BUILTIN_DATASET",
    "BUILTIN_MODEL",
    "BoxConfig",
    "ColumnMapping",
    "DataConfig",
    "DistributedConfig",
    "EvaluateConfig",
    "EvaluationConfig",
    "ExportConfig",
    "GenerationConfig",
    "LoraConfig",
    "ModelConfig",
    "RunConfig",
    "RuntimeConfig",
    "SourceConfig",
    "SplitConfig",
    "SubjectConfig",
    "TrackingConfig",
    "TrainingConfig",
]
