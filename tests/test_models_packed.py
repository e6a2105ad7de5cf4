"""Padding-free text: exact in outputs and in every gradient, in buckets of fixed size, and refused where it is not."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from models_helpers import BIDIRECTIONAL, CLIPA, EOS, SIGLIP, VIT, assert_same, captions, gradients, perturbed

from fastclip.models import CLIP, CLIPConfig
from fastclip.ops.attention import implementations
from fastclip.ops.attention.packing import caption_ends, pack_text

LENGTHS = ((3, 12, 7, 1, 5), (12, 12, 12), (1, 1), (2,))


@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
@pytest.mark.parametrize(
    "config", [VIT, replace(VIT, quick_gelu=True), EOS, replace(VIT, text=replace(VIT.text, ls_init_value=0.5))],
    ids=["gelu", "quickgelu", "eos", "layer-scale"],
)  # fmt: skip
def test_packed_is_padded_in_outputs_and_all_gradients(config: CLIPConfig, lengths: tuple[int, ...]) -> None:
    packed = perturbed(CLIP(config).double())
    padded = CLIP(config, packed_text=False).double()
    padded.load_state_dict(packed.state_dict())
    text = captions(config, lengths)
    features, truth = packed(text=text), padded(text=text)
    torch.testing.assert_close(features[1], truth[1], rtol=1e-12, atol=1e-12)
    ours, exact = gradients(packed, features[1:]), gradients(padded, truth[1:])
    assert ours.keys() == {name for name, _ in packed.named_parameters() if not name.startswith("visual")}
    assert_same(ours, exact, 1e-10)
    longest = max(caption_ends(text, config.text.eos_id if config is EOS else None)) + 1
    assert ours["positional_embedding"][longest:].eq(0).all()


@pytest.mark.parametrize("bucket", [1, 8, 16, 64])
def test_a_bucket_changes_nothing_but_the_shape(bucket: int) -> None:
    model = perturbed(CLIP(VIT).double())
    seen = set()
    for lengths in LENGTHS:
        text = captions(VIT, lengths)
        exact, filled = pack_text(text), pack_text(text, bucket=bucket)
        assert len(filled) == len(exact) == len(lengths)
        assert filled.tokens.numel() % bucket == 0
        assert filled.tokens.numel() < exact.tokens.numel() + filled.fillers + bucket
        assert filled.cu_seqlens[-1] == filled.tokens.numel()
        assert torch.equal(filled.cu_seqlens[: len(lengths) + 1], exact.cu_seqlens)
        assert filled.cu_seqlens.diff()[len(lengths) :].min() >= 1
        assert filled.cu_seqlens.diff().max() <= filled.max_seqlen == 12
        seen.add((filled.fillers, filled.max_seqlen))
        features = model(text=filled)
        torch.testing.assert_close(features[1], model(text=exact)[1], rtol=1e-12, atol=1e-12)
        assert_same(gradients(model, features[1:]), gradients(model, model(text=exact)[1:]), 1e-10)
    assert len(seen) == 1  # what a compiled graph depends on


def test_buckets_keep_the_compiled_graph() -> None:
    model = CLIP(VIT)
    graphs = []

    def count(module: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> torch.fx.GraphModule:
        graphs.append(module)
        return module

    compiled = torch.compile(model.encode_text, fullgraph=True, dynamic=False, backend=count)
    with torch.no_grad():
        for lengths in ((3, 12, 7), (1, 5, 9), (2, 2, 2)):
            text = pack_text(captions(VIT, lengths), bucket=32)
            torch.testing.assert_close(compiled(text), model.encode_text(text))
    assert len(graphs) == 1


@pytest.mark.parametrize("impl", ["sdpa", pytest.param("reference", marks=pytest.mark.long)])
def test_the_compiled_gradient_is_the_gradient(monkeypatch: pytest.MonkeyPatch, impl: str) -> None:
    """Dynamo of torch 2.11 lost what came through an index_copy_: silently."""
    monkeypatch.setattr(implementations, "order", lambda *_, **__: (impl,))
    model, text = CLIP(VIT), pack_text(captions(VIT), bucket=32)
    compiled = torch.compile(model.encode_text, fullgraph=True, backend="aot_eager")
    assert_same(gradients(model, (compiled(text),)), gradients(model, (model.encode_text(text),)), 1e-5)


@pytest.mark.parametrize(
    ("config", "reason"),
    [(SIGLIP, "no_causal_mask"), (CLIPA, "no_causal_mask"), (BIDIRECTIONAL, "no_causal_mask"),
     (replace(VIT, text=replace(VIT.text, pool_type="last")), '"last" pools the padding')],
    ids=["siglip", "clipa", "bidirectional", "last"],
)  # fmt: skip
def test_packing_is_refused_where_it_is_not_exact(config: CLIPConfig, reason: str) -> None:
    model = CLIP(config)
    text = captions(config)
    assert config.text.why_not_packed is not None
    with pytest.raises(ValueError, match=rf"text must be padded ids \(B, L\), was packed: .*{reason}"):
        model.encode_text(pack_text(text))
    behind = torch.where(torch.arange(12) > text.argmax(1)[:, None], 7, text)
    assert not torch.allclose(model.encode_text(text), model.encode_text(behind))  # the padding does have an effect


def test_mistakes_in_packed_captions() -> None:
    model = CLIP(VIT)
    with pytest.raises(ValueError, match="captions of at most 12 tokens, was 20"):
        model.encode_text(pack_text(torch.arange(1, 21)[None]))
    with pytest.raises(ValueError, match=r"bucket must be 0 \(none\) or a number of tokens, was -1"):
        pack_text(captions(VIT), bucket=-1)


@pytest.mark.parametrize("config", [SIGLIP, BIDIRECTIONAL, CLIPA], ids=["siglip", "bidirectional", "clipa"])
def test_the_last_block_for_pooled_rows_is_exact_for_bidirectional_text(config: CLIPConfig) -> None:
    model = perturbed(CLIP(config).double())
    text = captions(config)
    rows = []
    model.transformer.resblocks[-1].register_forward_hook(lambda module, args, out: rows.append(out.shape))
    pooled = model.encode_text(text)
    assert rows == [(5, config.text.width)]
    x = model.token_embedding(text) + model.positional_embedding
    for block in model.transformer.resblocks:
        x = block(x)
    ends = torch.full((5,), 11) if config.text.pool_type == "last" else text.argmax(1)
    full = model.ln_final(x[torch.arange(5), ends])
    projection = model.text_projection
    full = projection(full) if isinstance(projection, torch.nn.Linear) else full @ projection
    torch.testing.assert_close(pooled, full, rtol=1e-12, atol=1e-12)
