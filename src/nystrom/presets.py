"""What recipes offer: sizes and schedules for `nystrom pretrain`, and the settings that each attention reads."""

from typing import Any, Literal

Attention = Literal["softmax", "nystrom", "nystrom_shift", "nystrom_residual"]
"""What recipes call the kinds of attention; softmax is exact."""
SIZES = {
    "embed_dim": "hidden_size",
    "num_layers": "num_hidden_layers",
    "num_heads": "num_attention_heads",
    "ffn_dim": "intermediate_size",
    "conv_kernel_size": "conv_kernel_size",
}
"""Sizes that a preset has, or the model to start from: our names, and those in config.json."""
OPEN = {name: "preset" if name == "conv_kernel_size" else None for name in (*SIZES, "length", "steps", "batch_size")}
OPEN |= dict.fromkeys(("gradient_accumulation", "lr", "warmup", "schedule", "dropout"))
"""Settings that are the preset's where they are not given, and what says so."""

# Batches of 256 and the rate are the paper's; warm-up, the linear fall and the kernel those of the authors' code.
_PAPER = {
    **dict(conv_kernel_size=65, length=512, batch_size=32, gradient_accumulation=8),
    **dict(lr=1e-4, warmup=0.01, schedule="linear", dropout=0.1),
}
PRESETS: dict[str, dict[str, Any]] = {
    "tiny": {
        **dict(embed_dim=128, num_layers=4, num_heads=4, ffn_dim=512, conv_kernel_size=33, length=1024, dropout=0.0),
        **dict(steps=4000, batch_size=8, gradient_accumulation=1, lr=2e-3, warmup=0.05, schedule="cosine"),
    },
    "small": {**_PAPER, **dict(embed_dim=512, num_layers=4, num_heads=8, ffn_dim=2048, steps=100_000)},
    "base": {**_PAPER, **dict(embed_dim=768, num_layers=12, num_heads=12, ffn_dim=3072, steps=500_000)},
}
"""`tiny` trains on two cores, `small` and `base` are the paper's."""
FORM: dict[str, dict[str, Any]] = {
    "tiny": {"norm_first": True, "hidden_act": "gelu"},
    "small": {"norm_first": False, "hidden_act": "gelu_new"},
    "base": {"norm_first": False, "hidden_act": "gelu_new"},
}
"""What else a preset's model is, as config.json names it."""
FROM_A_MODEL = {"lr": 1e-4, "schedule": "linear", "dropout": None}
"""What differs where training starts from a model: a rate that does not wreck it, and its own dropout."""

READ_BY = {
    "softmax": {"conv_kernel_size"},
    "softmax_matrix": {"conv_kernel_size"},
    "nystrom": {"num_landmarks", "num_pinv_iters", "exact_below", "conv_kernel_size"},
    "nystrom_shift": {"num_landmarks", "num_pinv_iters", "exact_below", "conv_kernel_size"},
    "nystrom_residual": {"num_landmarks", "top_k", "window", "block", "exact_below", "conv_kernel_size"},
    "linformer": {"num_features", "conv_kernel_size"},
    "performer": {"num_features", "conv_kernel_size"},
    "performer_relu": {"num_features", "conv_kernel_size"},
    "reformer": {"num_hashes", "conv_kernel_size"},
    "linear": {"conv_kernel_size"},
    "longformer": {"window", "conv_kernel_size"},
    "bigbird": {"block", "conv_kernel_size"},
    "skyformer": {"num_landmarks", "conv_kernel_size"},
    "none": {"conv_kernel_size"},
}
"""Settings that each attention reads, in the order of a report's columns."""
