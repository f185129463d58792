"""`torch.nn.MultiheadAttention` at linear cost: the same constructor, call, masks and state dict."""

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from nystrom._precision import full_precision
from nystrom._validate import check_options
from nystrom._validate import key_padding_mask as as_key_mask
from nystrom.functional import nystrom_attention
from nystrom.maps import attention_factors

Masks = tuple[Bool[Tensor, "b s"] | None, Bool[Tensor, "b n"] | None]  # of keys, of queries; True = takes part


class MultiheadAttention(nn.Module):
    """Landmark attention in place of `torch.nn.MultiheadAttention`.

    Parameters, initialisation and state dict are torch's, so weights load both ways. Time is linear in both lengths, as
    `nystrom_attention`. Stands in for `self_attn` of `nn.TransformerEncoderLayer` and for `multihead_attn` of
    `nn.TransformerDecoderLayer`; their eval-mode shortcut, exact attention on our weights, is never taken. An
    `nn.TransformerEncoder` built from such a layer warns of that unless given `enable_nested_tensor=False`.

    Args:
        embed_dim: c, width of query and output; must be a multiple of num_heads.
        num_heads: h (count).
        dropout: probability of dropping a query's weight on a landmark while training (see `nystrom_attention`).
        bias: whether the four projections have one.
        add_bias_kv: must be False: a learned key would be averaged into the last segment of tokens.
        add_zero_attn: must be False: so would a zero key.
        kdim: width of key; default embed_dim.
        vdim: width of value; default embed_dim.
        batch_first: whether batched inputs are (b, n, c) and not (n, b, c).
        device: where the parameters are made.
        dtype: of the parameters.
        num_landmarks: m, landmarks per head (count).
        num_pinv_iters: steps of the inverse iteration (count).

    Raises:
        ValueError: embed_dim is no multiple of num_heads; add_bias_kv or add_zero_attn; an option out of range.

    Source: Xiong et al. 2021, arXiv:2102.03902; interface of torch 2.13.

    >>> import torch
    >>> layer = torch.nn.TransformerEncoderLayer(d_model=64, nhead=4, batch_first=True)
    >>> layer.self_attn = MultiheadAttention.from_torch(layer.self_attn, num_landmarks=16)
    >>> layer(torch.randn(2, 100, 64)).shape
    torch.Size([2, 100, 64])
    """

    # Read by nn.TransformerEncoderLayer and nn.TransformerEncoder: were it true, their eval mode would bypass forward.
    _qkv_same_embed_dim = False
    in_proj_weight: nn.Parameter | None
    in_proj_bias: nn.Parameter | None

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        dropout: float = 0.0,
        bias: bool = True,
        add_bias_kv: bool = False,
        add_zero_attn: bool = False,
        kdim: int | None = None,
        vdim: int | None = None,
        batch_first: bool = False,
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
        *,
        num_landmarks: int = 64,
        num_pinv_iters: int = 6,
    ) -> None:
        super().__init__()
        if num_heads < 1 or embed_dim < 1 or embed_dim % num_heads != 0:
            raise ValueError(f"embed_dim must be a positive multiple of num_heads: got {embed_dim} and {num_heads}")
        if add_bias_kv or add_zero_attn:
            raise ValueError(
                f"add_bias_kv and add_zero_attn must be False: got {add_bias_kv} and {add_zero_attn}. A landmark would "
                f"average the added key with tokens; use torch.nn.MultiheadAttention"
            )
        check_options(dropout, False, None, num_landmarks, num_pinv_iters)
        self.embed_dim = embed_dim
        self.num_heads = num_heads
        self.dropout = dropout
        self.kdim = embed_dim if kdim is None else kdim
        self.vdim = embed_dim if vdim is None else vdim
        self.batch_first = batch_first
        self.num_landmarks = num_landmarks
        self.num_pinv_iters = num_pinv_iters
        self._make_parameters(bias, device, dtype)

    def _make_parameters(self, bias: bool, device: torch.device | str | int | None, dtype: torch.dtype | None) -> None:
        """Torch's parameters, initialised in torch's order, so that one seed gives the same weights."""
        c = self.embed_dim
        self.out_proj = nn.Linear(c, c, bias=bias, device=device, dtype=dtype)
        packed = self.kdim == c and self.vdim == c
        shapes = {"q_proj_weight": (c, c), "k_proj_weight": (c, self.kdim), "v_proj_weight": (c, self.vdim)}
        for name, shape in {"in_proj_weight": (3 * c, c), **shapes}.items():
            self.register_parameter(name, None)
            if packed == (name == "in_proj_weight"):
                self.register_parameter(name, nn.Parameter(torch.empty(shape, device=device, dtype=dtype)))
                nn.init.xavier_uniform_(self.get_parameter(name))
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * c, device=device, dtype=dtype)) if bias else None
        if bias:
            nn.init.zeros_(self.out_proj.bias)

    @classmethod
    def from_torch(
        cls, module: nn.MultiheadAttention, *, num_landmarks: int = 64, num_pinv_iters: int = 6
    ) -> "MultiheadAttention":
        """A copy of an exact module, trained or not, that attends through landmarks.

        One line per layer: ``layer.self_attn = MultiheadAttention.from_torch(layer.self_attn)``.

        Args:
            module: what to copy: weights, settings, device, dtype, training mode and which weights are frozen.
            num_landmarks: m, landmarks per head (count).
            num_pinv_iters: steps of the inverse iteration (count).

        Raises:
            ValueError: the module was made with add_bias_kv or add_zero_attn.
        """
        same = ("embed_dim", "num_heads", "dropout", "add_zero_attn", "kdim", "vdim", "batch_first")
        copy = cls(
            **{name: getattr(module, name) for name in same},
            bias=module.in_proj_bias is not None,
            add_bias_kv=module.bias_k is not None,
            device=module.out_proj.weight.device,
            dtype=module.out_proj.weight.dtype,
            num_landmarks=num_landmarks,
            num_pinv_iters=num_pinv_iters,
        )
        copy.load_state_dict(module.state_dict())
        for name, parameter in module.named_parameters():
            copy.get_parameter(name).requires_grad_(parameter.requires_grad)
        return copy.train(module.training)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
        *,
        query_padding_mask: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """Attend from query to key and value. In the masks True means IGNORE, as in torch and unlike in this library.

        Args:
            query: (b, n, c) with batch_first, (n, b, c) without, (n, c) unbatched; or the nested tensor that
                `nn.TransformerEncoder` makes in eval mode.
            key: as query, of length s and width kdim.
            value: as key, of width vdim.
            key_padding_mask: (b, s), or (s) unbatched: bool, or additive float holding 0 and values <= -1e4.
            need_weights: also return the weights. They take O(b n s) memory, which the output alone does not.
            attn_mask: (n, s) or (b h, n, s), bool or additive, equal for every query and head.
            average_attn_weights: return the mean weights over the heads, (b, n, s), and not (b, h, n, s).
            is_causal: must be False.
            query_padding_mask: (b, n), or (n) unbatched, as key_padding_mask: queries to keep out of the landmarks.
                Default: the ignored keys in self-attention, where query and key are one tensor; otherwise none.

        Returns:
            The output, shaped as query, and the weights or None. The weights are the matrix that the landmarks stand
            for, before dropout: rows sum to about 1, and single entries may be negative. A sample without a key to
            attend to gives out_proj's bias and zero weights, where torch gives NaN.

        Raises:
            ValueError: shapes disagree; a mask varies by query or head, or holds a bias; is_causal; a nested query
                with anything that `nn.TransformerEncoderLayer` does not pass.
        """
        check_options(0.0, is_causal, None, self.num_landmarks, self.num_pinv_iters)
        if query.is_nested:
            masked = not (key_padding_mask is attn_mask is query_padding_mask is None)
            if not (query is key is value) or masked or need_weights:
                raise ValueError(
                    f"a nested query must come as its own key and value, unmasked, with need_weights=False: got "
                    f"self-attention {query is key is value}, a mask {masked}, need_weights={need_weights}. Pass "
                    f"padded tensors and a key_padding_mask instead"
                )
            return self._nested(query), None
        _check_states((query, key, value), (self.embed_dim, self.kdim, self.vdim), self.batch_first)
        unbatched, across = query.ndim == 2, query is not key
        batch_axis = 0 if unbatched or self.batch_first else 1
        query, key, value = (
            x.unsqueeze(0) if unbatched else x.transpose(0, batch_axis) for x in (query, key, value)
        )  # (b, n, c), (b, s, kdim), (b, s, vdim)
        (b, n), s, h = query.shape[:2], key.shape[1], self.num_heads
        rows = [((n, s), (1, 1, n, s)), ((b * h, n, s), (b, h, n, s))]
        found = [
            _take_part("key_padding_mask", key_padding_mask, [((b, s)[unbatched:], (b, 1, 1, s))], b, n, s),
            _take_part("attn_mask", attn_mask, rows, b, n, s),
        ]
        given = [mask for mask in found if mask is not None]
        key_mask = given[0] & given[-1] if given else None
        query_shape = ((b, n)[unbatched:], (b, 1, 1, n))
        query_mask = _take_part("query_padding_mask", query_padding_mask, [query_shape], b, n, n)
        if across and n == s and given and query_mask is None:  # or the op would take it for self-attention
            query_mask = query.new_ones(b, n, dtype=torch.bool)
        q, k, v = self._project(query, key, value)
        output = self._attend(q, k, v, (key_mask, query_mask)).transpose(0, batch_axis)
        weights = self._weights(q, k, (key_mask, query_mask), average_attn_weights) if need_weights else None
        if unbatched:
            return output.squeeze(0), None if weights is None else weights.squeeze(0)
        return output, weights

    def _nested(self, x: Tensor) -> Tensor:
        """Self-attention over the samples of a nested tensor, each of its own length."""
        samples = x.unbind()
        lengths = torch.tensor([len(sample) for sample in samples], device=x.device)
        padded = pad_sequence(list(samples), batch_first=True)  # (b, n, c)
        real = torch.arange(padded.shape[1], device=x.device) < lengths[:, None]  # (b, n)
        output = self._attend(*self._project(padded, padded, padded), (real, real))
        rows = [row[: len(sample)] for row, sample in zip(output, samples, strict=True)]
        return torch.nested.as_nested_tensor(rows, layout=x.layout)

    def _project(
        self, query: Float[Tensor, "b n c"], key: Float[Tensor, "b s k"], value: Float[Tensor, "b s v"]
    ) -> tuple[Float[Tensor, "b h n d"], Float[Tensor, "b h s d"], Float[Tensor, "b h s d"]]:
        if self.in_proj_weight is None:
            weights = [self.get_parameter(f"{name}_proj_weight") for name in "qkv"]
        else:
            weights = self.in_proj_weight.chunk(3)
        biases = (None, None, None) if self.in_proj_bias is None else self.in_proj_bias.chunk(3)
        q, k, v = (
            F.linear(x, weight, bias).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
            for x, weight, bias in zip((query, key, value), weights, biases, strict=True)
        )
        return q, k, v

    def _attend(
        self, q: Float[Tensor, "b h n d"], k: Float[Tensor, "b h s d"], v: Float[Tensor, "b h s d"], masks: Masks
    ) -> Float[Tensor, "b n c"]:
        key_mask, query_mask = masks
        m, iters, dropout_p = self.num_landmarks, self.num_pinv_iters, self.dropout if self.training else 0.0
        attended = nystrom_attention(
            q, k, v, key_mask, dropout_p, query_mask=query_mask, num_landmarks=m, num_pinv_iters=iters
        )
        return self.out_proj(attended.transpose(1, 2).flatten(2))

    def _weights(
        self, q: Float[Tensor, "b h n d"], k: Float[Tensor, "b h s d"], masks: Masks, average: bool
    ) -> Float[Tensor, "b *h n s"]:
        """The matrix `left @ core_pinv @ right`, per head or their mean."""
        key_mask, query_mask = masks
        m, iters = self.num_landmarks, self.num_pinv_iters
        left, core_pinv, right = attention_factors(
            q, k, key_mask, query_mask=query_mask, num_landmarks=m, num_pinv_iters=iters
        )
        with full_precision(q.device):
            left = left @ core_pinv
            if average:  # one product over heads and landmarks together: no (b, h, n, s) array
                matrix = left.transpose(1, 2).flatten(2) @ right.flatten(1, 2) / self.num_heads
            else:
                matrix = left @ right
            return matrix.to(q.dtype)

    def extra_repr(self) -> str:
        return f"num_heads={self.num_heads}, num_landmarks={self.num_landmarks}, num_pinv_iters={self.num_pinv_iters}"


def _take_part(
    name: str, ignore: Tensor | None, forms: list[tuple[tuple[int, ...], tuple[int, ...]]], b: int, n: int, s: int
) -> Bool[Tensor, "b s"] | None:
    """A mask of torch's (True or -inf = ignore) as ours (True = takes part); `forms` pairs its shapes with 4-D ones."""
    if ignore is None:
        return None
    views = [view for shape, view in forms if tuple(ignore.shape) == shape]
    if not views or not (ignore.dtype == torch.bool or ignore.is_floating_point()):
        raise ValueError(
            f"{name} must be bool (True = ignore) or additive float (-inf = ignore), of shape "
            f"{' or '.join(str(shape) for shape, _ in forms)}: got {ignore.dtype} of shape {tuple(ignore.shape)}"
        )
    mask = ignore.reshape(views[0])
    try:
        return as_key_mask(~mask if mask.dtype == torch.bool else mask, b, n, s)
    except ValueError as error:
        raise ValueError(
            f"{name} must be the same for every query and head, without a bias, as all share the landmarks: {error}. "
            f"Pass padding as a bool key_padding_mask; for other masks use torch.nn.MultiheadAttention"
        ) from None


def _check_states(states: tuple[Tensor, Tensor, Tensor], widths: tuple[int, int, int], batch_first: bool) -> None:
    """Raise ValueError unless query, key and value have these widths and fit one another."""
    query, key, value = (tuple(x.shape) for x in states)
    batch_axis = 0 if batch_first else 1
    fit = len(query) in (2, 3) and len(query) == len(key) and key[:-1] == value[:-1]
    fit = fit and (query[-1], key[-1], value[-1]) == widths
    if not fit or (len(query) == 3 and query[batch_axis] != key[batch_axis]):
        layout = "(batch, length, width)" if batch_first else "(length, batch, width)"
        raise ValueError(
            f"query, key and value must be {layout} or unbatched (length, width), of widths {widths} and one batch "
            f"size, key and value of one length: got query {query}, key {key}, value {value}"
        )
