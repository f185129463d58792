"""Attention kinds to compare Nyström attention with, one file each, all called as ``attend(query, key, value, mask)``.

query, key and value are (b, h, n, d), value may be of another width v; mask is (b, n), True = takes part, or None. The
result is (b, h, n, v) in value's dtype, zero at masked tokens. Arithmetic is in float32 or wider. What a masked token
holds, NaN included, changes nothing and gets no gradient; nor does it matter how much padding follows a sample, or what
else is in its batch. No kind drops weights in training.
"""

from nystrom.baselines.bigbird import BigBirdAttention as BigBirdAttention
from nystrom.baselines.linear import linear_attention as linear_attention
from nystrom.baselines.linformer import LinformerAttention as LinformerAttention
from nystrom.baselines.performer import PerformerAttention as PerformerAttention
from nystrom.baselines.performer import PerformerReLUAttention as PerformerReLUAttention
from nystrom.baselines.reformer import ReformerAttention as ReformerAttention
from nystrom.baselines.skyformer import SkyformerAttention as SkyformerAttention
from nystrom.baselines.window import window_attention as window_attention

__all__ = [
    "BigBirdAttention",
    "LinformerAttention",
    "PerformerAttention",
    "PerformerReLUAttention",
    "ReformerAttention",
    "SkyformerAttention",
    "linear_attention",
    "window_attention",
]
