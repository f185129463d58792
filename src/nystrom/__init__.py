"""Linear-cost attention for PyTorch: Nyströmformer and what follows from it."""

from nystrom.attention import NystromAttention as NystromAttention
from nystrom.encoder import Encoder as Encoder
from nystrom.encoder import EncoderConfig as EncoderConfig
from nystrom.encoder import MaskedLM as MaskedLM
from nystrom.encoder import SequenceClassifier as SequenceClassifier
from nystrom.functional import iterative_pinv as iterative_pinv
from nystrom.functional import nystrom_attention as nystrom_attention
from nystrom.functional import segment_means as segment_means

__version__ = "0.1.0"

__all__ = [
    "Encoder",
    "EncoderConfig",
    "MaskedLM",
    "NystromAttention",
    "SequenceClassifier",
    "iterative_pinv",
    "nystrom_attention",
    "segment_means",
]
