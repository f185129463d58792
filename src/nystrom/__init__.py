"""Linear-cost attention for PyTorch: Nyströmformer and what follows from it."""

from nystrom.functional import iterative_pinv as iterative_pinv
from nystrom.functional import nystrom_attention as nystrom_attention
from nystrom.functional import segment_means as segment_means

__version__ = "0.1.0"
