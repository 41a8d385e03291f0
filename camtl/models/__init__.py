"""Models: the configuration, the encoder and the multi-task model.

Importing this package registers the classes with ``AutoConfig``, ``AutoModel``,
``AutoModelForSequenceClassification`` and ``AutoModelForTokenClassification`` (by which Hugging Face's
pipelines of these names know them).
"""

from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
)

from camtl.models.configuration import PRESETS, SWITCHES, CaMtlConfig
from camtl.models.encoder import CaMtlModel
from camtl.models.freezing import no_weight_decay
from camtl.models.loading import read_encoder_config, resolve_encoder
from camtl.models.modeling import CaMtlForMultiTask
from camtl.models.outputs import CaMtlModelOutput, CaMtlOutput
from camtl.models.pipelines import TaskPipeline, pipeline

AutoConfig.register(CaMtlConfig.model_type, CaMtlConfig, exist_ok=True)
AutoModel.register(CaMtlConfig, CaMtlModel, exist_ok=True)
AutoModelForSequenceClassification.register(CaMtlConfig, CaMtlForMultiTask, exist_ok=True)
AutoModelForTokenClassification.register(CaMtlConfig, CaMtlForMultiTask, exist_ok=True)

__all__ = [
    "PRESETS",
    "SWITCHES",
    "CaMtlConfig",
    "CaMtlForMultiTask",
    "CaMtlModel",
    "CaMtlModelOutput",
    "CaMtlOutput",
    "TaskPipeline",
    "no_weight_decay",
    "pipeline",
    "read_encoder_config",
    "resolve_encoder",
]
