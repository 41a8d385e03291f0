"""Models: the configuration, the encoder and the multi-task model.

Importing this package registers the classes with ``AutoConfig`` and ``AutoModel``.
"""

from transformers import AutoConfig, AutoModel, AutoModelForSequenceClassification
from transformers.models.auto.modeling_auto import MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES

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
# By these names the text-classification pipeline knows whom it can run; it does not ask what was registered.
MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES.setdefault(CaMtlConfig.model_type, CaMtlForMultiTask.__name__)

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
