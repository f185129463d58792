"""Hugging Face: `import nystrom.hf` makes "nystrom", "nystrom_shift" and "nystrom_residual" values of transformers'
`attn_implementation`, for any encoder that takes its attention from transformers' AttentionInterface.

    import nystrom.hf
    model = AutoModel.from_pretrained(path, attn_implementation="nystrom_residual")

It also registers our Nyströmformer models with the Auto classes.
"""

from nystrom.hf.configuration import NystromformerConfig as NystromformerConfig
from nystrom.hf.interface import register as _register
from nystrom.hf.modeling import NystromformerForMaskedLM as NystromformerForMaskedLM
from nystrom.hf.modeling import NystromformerForMultipleChoice as NystromformerForMultipleChoice
from nystrom.hf.modeling import NystromformerForQuestionAnswering as NystromformerForQuestionAnswering
from nystrom.hf.modeling import NystromformerForSequenceClassification as NystromformerForSequenceClassification
from nystrom.hf.modeling import NystromformerForTokenClassification as NystromformerForTokenClassification
from nystrom.hf.modeling import NystromformerModel as NystromformerModel
from nystrom.hf.pretraining import NystromformerForPreTraining as NystromformerForPreTraining
from nystrom.hf.settings import Settings as Settings
from nystrom.hf.settings import configure as configure

_register()

__all__ = [
    "NystromformerConfig",
    "NystromformerForMaskedLM",
    "NystromformerForMultipleChoice",
    "NystromformerForPreTraining",
    "NystromformerForQuestionAnswering",
    "NystromformerForSequenceClassification",
    "NystromformerForTokenClassification",
    "NystromformerModel",
    "Settings",
    "configure",
]
