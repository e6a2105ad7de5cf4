"""`fastclip.attention` in the attention modules of open_clip, timm and PyTorch: same parameters, same result."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from torch import Tensor, nn
from torch.nn import functional as F

from fastclip.errors import UserError
from fastclip.interop.drop_in import DropIn, Replacement
from fastclip.ops.attention import attention

Forward = Callable[..., Any]


class Captions(NamedTuple):
    """Where captions that lie end to end begin and end; stands where the towers hand on their causal mask."""

    cu_seqlens: Tensor  # (B + 1,) int32
    max_seqlen: int

    def to(self, *_: Any, **__: Any) -> Captions:
        """Itself: the blocks cast their mask."""
        return self


def fast_attention(model: nn.Module, impl: str = "auto") -> DropIn:
    """A drop-in for the self-attention in `model`: of timm's ViTs, of open_clip's towers, and `nn.MultiheadAttention`.

    One product makes Q, K and V, and attention reads them where it wrote them. Calls with a mask or with other keys and
    values, or that ask for the weights, or that drop some of them in training, run the library's code, as modules of
    other kinds do (query-key normalisation, cosine attention). Replaced is each module's `forward`; its hooks run.

    Args:
        model: any module; its parameters stay where they are.
        impl: as `fastclip.attention`.

    Raises:
        UserError: on `enable`, when there is no attention in it that could be replaced.
    """

    def find() -> list[Replacement]:
        found = attention_replacements(model, impl)
        if not found:
            raise UserError(
                f"{type(model).__name__} has no self-attention that can be replaced: none of nn.MultiheadAttention "
                "(with one width for queries, keys and values), timm's Attention or open_clip's Attention"
            )
        return found

    return DropIn("fast_attention", find)


def attention_replacements(model: nn.Module, impl: str) -> list[Replacement]:
    """The forwards in `model` that can be replaced."""
    found = []
    for module in model.modules():
        make = _timm(module, impl) or _one_projection(module, impl)
        if make:
            found.append(Replacement(module, "forward", make))
    return found


def _timm(module: Any, impl: str) -> Callable[[Forward], Forward] | None:
    """For timm's `Attention`: `qkv`, then attention, `norm`, gate, `proj`."""
    if not _is(module, "timm.layers.attention", "Attention") or not _are_identities(module.q_norm, module.k_norm):
        return None

    def make(theirs: Forward) -> Forward:
        def forward(self: Any, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
            if attn_mask is not None or (self.training and dropout(self)):
                return theirs(self, x, attn_mask=attn_mask, is_causal=is_causal)
            qkv = self.qkv(x).unflatten(-1, (3, self.num_heads, self.head_dim))  # (B, N, 3, H, D)
            out = self.norm(attention(qkv, causal=is_causal, impl=impl).flatten(-2))
            gate = getattr(self, "gate", None)
            out = out if gate is None else out * gate(x).sigmoid()
            return self.proj_drop(self.proj(out))

        return forward

    return make


def _one_projection(module: Any, impl: str) -> Callable[[Forward], Forward] | None:
    """For `nn.MultiheadAttention` and open_clip's `Attention`: `in_proj_weight`, then attention, then `out_proj`.

    The mask may be `Captions`: x, (1, T, W) or (T, 1, W), then holds them.
    """
    is_torchs = type(module) is nn.MultiheadAttention
    if is_torchs:
        is_plain = module._qkv_same_embed_dim and module.bias_k is None and not module.add_zero_attn
        batch_first = module.batch_first
    elif _is(module, "open_clip.transformer", "Attention"):
        is_plain = module.in_proj_weight is not None and module.logit_scale is None and module.head_scale is None
        is_plain = is_plain and _are_identities(module.ln_q, module.ln_k)
        batch_first = True
    else:
        return None
    if not is_plain:
        return None

    def make(theirs: Forward) -> Forward:
        def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
            x: Any = args[0] if args else kwargs.get("query", kwargs.get("x"))
            mask: Any = kwargs.get("attn_mask")
            is_packed = isinstance(mask, Captions)
            if not is_packed and (not _is_plain(x, args, kwargs) or (self.training and dropout(self))):
                return theirs(self, *args, **kwargs)
            x = x if batch_first else x.transpose(0, 1)
            qkv = F.linear(x, self.in_proj_weight, self.in_proj_bias)
            qkv = qkv.unflatten(-1, (3, self.num_heads, -1))  # (B, N, 3, H, D)
            if is_packed:
                out = attention(qkv[0], mask.cu_seqlens, mask.max_seqlen, causal=True, impl=impl)[None].flatten(-2)
            else:
                out = attention(qkv, impl=impl).flatten(-2)
            out = out if batch_first else out.transpose(0, 1)
            if is_torchs:
                return self.out_proj(out), None
            return self.out_drop(self.out_proj(self.ln_inner(out)))

        return forward

    return make


def dropout(module: Any) -> float:
    """The share of attention weights that the module drops in training."""
    return module.dropout if isinstance(module, nn.MultiheadAttention) else module.attn_drop.p


def _is_plain(x: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether all of x looks at all of x: no mask, no other keys, no weights asked for."""
    keys = [*args[1:], *(kwargs.get(name) for name in ("k_x", "v_x", "key", "value"))]
    options = (kwargs.get(name) for name in ("attn_mask", "key_padding_mask", "is_causal"))
    is_torchs_call = len(args) > 1 or "key" in kwargs
    return (
        x.dim() == 3
        and all(key is None or key is x for key in keys)
        and all(option is None or option is False for option in options)
        and not (is_torchs_call and kwargs.get("need_weights", True))
    )


def _are_identities(*modules: Any) -> bool:
    return all(isinstance(module, nn.Identity) for module in modules)


def _is(module: Any, file: str, name: str) -> bool:
    """Whether the module is of that very class; its library is not imported to know."""
    return type(module).__module__ == file and type(module).__name__ == name
