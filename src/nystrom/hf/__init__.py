"""Hugging Face: `import nystrom.hf` makes "nystrom", "nystrom_shift" and "nystrom_residual" values of transformers'
`attn_implementation`, for any encoder that takes its attention from transformers' AttentionInterface.

    import nystrom.hf
    model = AutoModel.from_pretrained(path, attn_implementation="nystrom_residual")
"""

from nystrom.hf.interface import register as _register
from nystrom.hf.settings import Settings as Settings
from nystrom.hf.settings import configure as configure

_register()

__all__ = ["Settings", "configure"]
