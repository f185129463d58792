"""The settings of swapped attention: they live in a model's config, under "nystrom", and so in its config.json."""

from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any, Literal, get_args

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

Attention = Literal["nystrom", "nystrom_shift", "nystrom_residual"]
"""What `attn_implementation` can be beside transformers' own."""
ATTENTIONS: tuple[str, ...] = get_args(Attention)
EXACT_BELOW: dict[str, int] = {"nystrom": 1024, "nystrom_shift": 2048, "nystrom_residual": 4096}
"""Tokens under which exact attention is the faster one."""


@dataclass(frozen=True, kw_only=True)
class Settings:
    """How one layer attends; each field is read by the attentions that its line names."""

    num_landmarks: int = 64
    """m, landmarks or clusters of keys per head (count). All."""
    num_pinv_iters: int = 6
    """Steps of the inverse (count). nystrom, nystrom_shift."""
    top_k: int = 64
    """Keys that a block of queries reads exactly, beside its window (count). nystrom_residual."""
    window: int | None = None
    """Tokens around a block that it reads exactly (count); None: its own. nystrom_residual."""
    block: int = 32
    """Consecutive queries that share their exact keys (count). nystrom_residual."""
    exact_below: int | None = None
    """Inputs of fewer tokens, padding included, get exact attention; None: `EXACT_BELOW`; 0: none do. All."""
    exact_causal: bool = False
    """Leave causal layers, as in a decoder, at exact attention, instead of refusing them. All."""


def configure(
    model: "PreTrainedModel",
    attention: Attention | Literal["sdpa", "eager"] | None = None,
    *,
    layers: dict[int, dict[str, Any]] | None = None,
    **settings: Any,
) -> "PreTrainedModel":
    """Set what a model's attention does; what is not named stays as it is.

    Args:
        model: any transformers model; its parts with configs of their own are set alike.
        attention: switch to it. config.json then names it with the settings, and `from_pretrained` finds it again.
            transformers forgets the name when it loads a model; an eager forward pass, or `configure(model)`, restores
            it for the next saving. "sdpa" and "eager" switch back.
        layers: settings of single layers, by their number; on top of those of all layers.
        settings: fields of `Settings`, by name.

    Returns:
        The model, changed in place.

    Raises:
        ValueError: no such setting, layer or attention; a value out of range; the model takes its attention from
            elsewhere, or its layers do not know their number. The model is then as it was.

    >>> from transformers import BertConfig, BertModel
    >>> sizes = dict(hidden_size=32, num_attention_heads=2, num_hidden_layers=2, intermediate_size=64)
    >>> model = configure(BertModel(BertConfig(**sizes)), "nystrom_residual", top_k=32, layers={0: {"top_k": 96}})
    >>> model.config.nystrom
    {'top_k': 32, 'layers': {'0': {'top_k': 96}}}
    """
    from transformers import PreTrainedConfig, PreTrainedModel

    if attention is not None and attention not in (*ATTENTIONS, "sdpa", "eager"):
        raise ValueError(f"attention must be one of {', '.join(ATTENTIONS)}, sdpa, eager: got {attention!r}")
    for part in model.modules():
        if isinstance(part, PreTrainedModel) and part.config.model_type == "nystrom":
            raise ValueError(
                f"{type(part).__name__} makes its attention itself: set attention, num_landmarks and num_pinv_iters of "
                "its config, and build or load it with that"
            )
        if isinstance(part, PreTrainedModel) and not part._can_set_attn_implementation():
            raise ValueError(
                f"{type(part).__name__} does not take its attention from transformers' AttentionInterface: "
                "it cannot be exchanged"
            )
    wanted = {str(number): dict(own) for number, own in (layers or {}).items()}
    _check_layers(model, wanted)
    found = [getattr(module, "config", None) for module in model.modules()]
    configs = {id(config): config for config in found if isinstance(config, PreTrainedConfig)}
    merged = {key: _merge(config, settings, wanted) for key, config in configs.items()}
    if attention is not None:
        model.set_attn_implementation(attention)
        for config in configs.values():
            config._attn_implementation = attention  # it misses the configs of parts that another model was made of
    for key, config in configs.items():
        config.nystrom = merged[key]
        if config._attn_implementation in ATTENTIONS:
            config.attn_implementation = config._attn_implementation
        else:
            vars(config).pop("attn_implementation", None)
    return model


def settings_of(config: "PreTrainedConfig | None", layer: int | None) -> Settings:
    """What config.json and `configure` say for a layer.

    Raises:
        ValueError: the config's "nystrom" is no such settings; it sets single layers, and this one has no number.
    """
    stored = getattr(config, "nystrom", None)
    if stored is None:
        return Settings()
    if not isinstance(stored, dict):
        raise ValueError(f'config.nystrom must be settings by name, as {{"num_landmarks": 64}}: got {stored!r}')
    common = {name: value for name, value in stored.items() if name != "layers"}
    layers = stored.get("layers", {})
    if layers and layer is None:
        raise ValueError(f"config.nystrom sets layers {', '.join(layers)}, but this layer does not know its number")
    return checked(common | layers.get(str(layer), {}))


def checked(values: dict[str, Any]) -> Settings:
    """Settings of these values.

    Raises:
        ValueError: there is no such setting; a value is out of range.
    """
    known = asdict(Settings())
    for name, value in values.items():
        if name not in known:
            raise ValueError(f"no setting {name!r}: there are {', '.join(known)}")
        if name == "exact_causal":
            if not isinstance(value, bool):
                raise ValueError(f"exact_causal must be True or False: got {value!r}")
            continue
        least = 0 if name in ("top_k", "window", "exact_below") else 1
        may_be_none = known[name] is None
        if value is None and may_be_none:
            continue
        if not isinstance(value, int) or isinstance(value, bool) or value < least:
            rule = f"an integer of at least {least}" + (" or None" if may_be_none else "")
            raise ValueError(f"{name} must be {rule}: got {value!r}")
    made = replace(Settings(), **values)
    if made.window and made.window < made.block:
        raise ValueError(f"window must be None, 0 or at least block: got {made.window} and {made.block}")
    return made


def _merge(config: "PreTrainedConfig", settings: dict[str, Any], layers: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """The config's settings with these over them, checked."""
    before = dict(getattr(config, "nystrom", None) or {})
    common = {name: value for name, value in before.items() if name != "layers"} | settings
    checked(common)
    own = {number: dict(values) for number, values in before.get("layers", {}).items()}
    for number, values in layers.items():
        own[number] = own.get(number, {}) | values
    for number, values in own.items():
        try:
            checked(common | values)
        except ValueError as error:
            raise ValueError(f"layer {number}: {error}") from None
    return common | ({"layers": own} if own else {})


def _check_layers(model: "PreTrainedModel", layers: dict[str, dict[str, Any]]) -> None:
    if not layers:
        return
    found: set[Any] = {module.layer_idx for module in model.modules() if hasattr(module, "layer_idx")}
    if not found or None in found:
        few = "some of the layers" if found - {None} else "the layers"
        raise ValueError(f"{few} of {type(model).__name__} do not know their number; set all of them alike")
    for number in layers:
        if number not in map(str, found):
            raise ValueError(f"no layer {number}: {type(model).__name__} has 0 to {max(found)}")
