"""Linear-cost attention for PyTorch: Nyströmformer and what follows from it."""

from nystrom.attention import NystromAttention as NystromAttention
from nystrom.encoder import Encoder as Encoder
from nystrom.encoder import EncoderConfig as EncoderConfig
from nystrom.encoder import MaskedLM as MaskedLM
from nystrom.encoder import SequenceClassifier as SequenceClassifier
from nystrom.functional import nystrom_attention as nystrom_attention
from nystrom.inverses import chebyshev_pinv as chebyshev_pinv
from nystrom.inverses import iterative_pinv as iterative_pinv
from nystrom.inverses import ridge_pinv as ridge_pinv
from nystrom.inverses import svd_pinv as svd_pinv
from nystrom.landmarks import grid_means as grid_means
from nystrom.landmarks import kmeans as kmeans
from nystrom.landmarks import segment_means as segment_means
from nystrom.landmarks import strided as strided
from nystrom.maps import attention_factors as attention_factors
from nystrom.maps import attention_rows as attention_rows
from nystrom.multihead import MultiheadAttention as MultiheadAttention
from nystrom.residual import residual_nystrom_attention as residual_nystrom_attention
from nystrom.spectral import additive_shift_attention as additive_shift_attention
from nystrom.spectral import spectral_shift_attention as spectral_shift_attention

__version__ = "0.1.0"

__all__ = [
    "Encoder",
    "EncoderConfig",
    "MaskedLM",
    "MultiheadAttention",
    "NystromAttention",
    "SequenceClassifier",
    "additive_shift_attention",
    "attention_factors",
    "attention_rows",
    "chebyshev_pinv",
    "grid_means",
    "iterative_pinv",
    "kmeans",
    "nystrom_attention",
    "residual_nystrom_attention",
    "ridge_pinv",
    "segment_means",
    "spectral_shift_attention",
    "strided",
    "svd_pinv",
]
