"""A pretrained encoder with a new classification head, and the attention of one's choice."""

from typing import TYPE_CHECKING, Any, Literal, cast

from transformers import AutoConfig, AutoModelForSequenceClassification
from transformers.utils import logging

from nystrom.hf.settings import configure
from nystrom.models import num_positions

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Attention = Literal["softmax", "nystrom", "nystrom_shift", "nystrom_residual"]
OWN = {"softmax": "exact", "nystrom": "nystrom", "nystrom_shift": "shift", "nystrom_residual": "residual"}
"""What our Nyströmformer's config calls them."""


def load_classifier(
    name: str, labels: tuple[str, ...], length: int, attention: Attention | None, settings: dict[str, Any]
) -> "PreTrainedModel":
    """The encoder with a new head.

    Args:
        name: folder, or name on the Hugging Face Hub.
        labels: names of the classes; none: one number is predicted, by its squared error.
        length: tokens that it is to read (count).
        attention: None: what its folder says.
        settings: fields of `Settings`, by name; those of the folder stay where none are given.

    Raises:
        ValueError: the model does not take this attention, one of the settings, or the length.
    """
    head: dict[str, Any] = {"num_labels": 1, "problem_type": "regression"}
    if labels:
        names = dict(enumerate(labels))
        head = {"id2label": names, "label2id": {label: i for i, label in names.items()}}
        head["problem_type"] = "single_label_classification"
    own = AutoConfig.from_pretrained(name).model_type == "nystrom"
    if own:
        for field in settings.keys() - {"num_landmarks"}:
            raise ValueError(f"{field} is no setting of a Nyströmformer of ours: got {settings[field]}; leave it out")
        head |= settings | ({} if attention is None else {"attention": OWN[attention]})
    model = _load(name, head)
    if not own:
        configure(model, cast(Any, "sdpa" if attention == "softmax" else attention), **settings)
    reach = num_positions(model)
    if reach is not None and length > reach:
        raise ValueError(
            f"length must be at most the {reach} tokens that {name} reads: got {length}; shorten it, or first make the "
            f"model longer: nystrom convert {name} OUT --length {length}"
        )
    return model


def _load(name: str, head: dict[str, Any]) -> "PreTrainedModel":
    """Without transformers' report of the head's weights, which are meant to be new; but no others may be."""
    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        model, info = AutoModelForSequenceClassification.from_pretrained(name, output_loading_info=True, **head)
    finally:
        logging.set_verbosity(before)
    encoder = f"{model.base_model_prefix}."
    missing = sorted(key for key in info["missing_keys"] if key.startswith(encoder) and "pooler." not in key)
    if missing:
        raise ValueError(f"{name}: weights of the encoder are missing: {', '.join(missing[:3])}; is it an encoder?")
    return model


def attention_of(model: "PreTrainedModel") -> Attention:
    """Which one it runs."""
    if model.config.model_type == "nystrom":
        return next(cast(Attention, name) for name, ours in OWN.items() if ours == model.config.attention)
    name = model.config._attn_implementation
    return cast(Attention, name) if name in OWN else "softmax"
