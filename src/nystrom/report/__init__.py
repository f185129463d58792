"""Runs side by side: what `nystrom finetune` and `nystrom pretrain` left behind, as one table."""
