"""Attention over sequences that several processes hold a stretch of each."""

from nystrom.distributed.cost import traffic as traffic
from nystrom.distributed.functional import (
    sequence_parallel_nystrom_attention as sequence_parallel_nystrom_attention,
)
from nystrom.distributed.modules import sequence_parallel_convolution as sequence_parallel_convolution
from nystrom.distributed.modules import split_sequence as split_sequence
from nystrom.distributed.spectral import (
    sequence_parallel_spectral_shift_attention as sequence_parallel_spectral_shift_attention,
)
