"""Tensor maps: published layouts become native ones and come back bit for bit; what doesn't fit is named."""

from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from dllm_ray.errors import ModelError
from dllm_ray.models.checkpoint import Checkpoint, HeldTensor, whole
from dllm_ray.models.mapping import Fused, Rename, Stacked, experts, summary, to_native, to_original

QKV = ("q_proj", "k_proj", "v_proj")
ATTENTION = "model.layers.{i}.self_attn"
RULES = (
    Rename("wte.weight", "model.embed_tokens.weight"),
    Rename("blocks.{i}.attn_out.weight", f"{ATTENTION}.o_proj.weight"),
    Fused("blocks.{i}.att_proj.weight", tuple(f"{ATTENTION}.{part}.weight" for part in QKV)),
    Fused("blocks.{i}.att_proj.bias", tuple(f"{ATTENTION}.{part}.bias" for part in QKV)),
    *experts("model.layers.{i}.mlp"),
)
VOCABULARY = 5

Tensors = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Sizes:
    """A small model with fused attention and stacked experts. Queries have more heads than keys and values."""

    layers: int = 2
    experts: int = 3
    width: int = 4
    heads: int = 2
    kv_heads: int = 1
    head_dim: int = 3
    inner: int = 2
    bias: bool = True
    dtype: torch.dtype = torch.float32


def both_layouts(sizes: Sizes) -> tuple[Tensors, Tensors]:
    """(published tensors, the same as native ones), put together here by plain torch."""
    generator = torch.Generator().manual_seed(0)

    def new(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator).to(sizes.dtype)

    embeddings, norm = new(VOCABULARY, sizes.width), new(sizes.width)
    published = {"wte.weight": embeddings, "model.norm.weight": norm}
    native = {"model.embed_tokens.weight": embeddings, "model.norm.weight": norm}
    for layer in range(sizes.layers):
        attention, mlp = f"model.layers.{layer}.self_attn", f"model.layers.{layer}.mlp"
        out = new(sizes.width, sizes.heads * sizes.head_dim)
        published[f"blocks.{layer}.attn_out.weight"] = native[f"{attention}.o_proj.weight"] = out
        rows = [heads * sizes.head_dim for heads in (sizes.heads, sizes.kv_heads, sizes.kv_heads)]
        for kind, columns in [("weight", (sizes.width,)), ("bias", ())][: 1 + sizes.bias]:
            parts = [new(count, *columns) for count in rows]
            published[f"blocks.{layer}.att_proj.{kind}"] = torch.cat(parts)
            native |= {f"{attention}.{name}.{kind}": part for name, part in zip(QKV, parts, strict=True)}
        gates = [new(sizes.inner, sizes.width) for _ in range(sizes.experts)]
        ups = [new(sizes.inner, sizes.width) for _ in range(sizes.experts)]
        downs = [new(sizes.width, sizes.inner) for _ in range(sizes.experts)]
        for number, parts in enumerate(zip(gates, ups, downs, strict=True)):
            for name, part in zip(("gate_proj", "up_proj", "down_proj"), parts, strict=True):
                published[f"{mlp}.experts.{number}.{name}.weight"] = part
        native[f"{mlp}.experts.gate_up_proj"] = torch.cat([torch.stack(gates), torch.stack(ups)], dim=1)
        native[f"{mlp}.experts.down_proj"] = torch.stack(downs)
    return published, native


def held(tensors: Tensors) -> dict[str, HeldTensor]:
    return {name: HeldTensor(tensor) for name, tensor in tensors.items()}


def shapes(tensors: Tensors) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


def equal(found, expected: Tensors) -> bool:
    """Whether mapped tensors are these, with their types, bit for bit."""
    read = {name: tensor.read() for name, tensor in found.items()}
    return set(read) == set(expected) and all(
        read[name].dtype == found[name].dtype == tensor.dtype
        and tuple(read[name].shape) == tuple(found[name].shape)
        and torch.equal(read[name], tensor)
        for name, tensor in expected.items()
    )


def as_native(published: Tensors, native: Tensors, rules=RULES, **options):
    return to_native(rules, held(published), shapes(native), "here", **options)


SIZES = st.builds(
    Sizes,
    layers=st.integers(1, 12),
    experts=st.integers(1, 12),
    width=st.integers(1, 5),
    heads=st.integers(1, 4),
    kv_heads=st.integers(1, 4),
    head_dim=st.integers(1, 3),
    inner=st.integers(1, 3),
    bias=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
)


# --- both directions


@settings(max_examples=30)
@given(sizes=SIZES)
def test_a_published_layout_becomes_the_native_one(sizes):
    published, native = both_layouts(sizes)
    assert equal(as_native(published, native), native)


@settings(max_examples=30)
@given(sizes=SIZES)
def test_a_native_layout_becomes_the_published_one(sizes):
    published, native = both_layouts(sizes)
    assert equal(to_original(RULES, held(native)), published)


@settings(max_examples=30)
@given(sizes=SIZES)
def test_there_and_back_gives_the_same_bits(sizes):
    published, native = both_layouts(sizes)
    assert equal(to_original(RULES, as_native(published, native)), published)


@settings(max_examples=30)
@given(sizes=SIZES)
def test_back_and_there_gives_the_same_bits(sizes):
    _, native = both_layouts(sizes)
    assert equal(to_native(RULES, to_original(RULES, held(native)), shapes(native), "here"), native)


def test_the_order_of_names_does_not_matter():
    published, native = both_layouts(Sizes())
    backwards = dict(reversed(published.items()))
    assert equal(as_native(backwards, dict(reversed(native.items()))), native)
    assert equal(to_original(RULES, held(dict(reversed(native.items())))), published)


def test_tensors_in_a_file_are_mapped_like_tensors_in_memory(tmp_path):
    published, native = both_layouts(Sizes(dtype=torch.bfloat16))
    (tmp_path / "config.json").write_text("{}")
    save_file(published, tmp_path / "model.safetensors")
    tensors = Checkpoint(str(tmp_path)).tensors
    assert equal(to_native(RULES, tensors, shapes(native), "here"), native)


def test_without_rules_every_tensor_keeps_its_name():
    published, _ = both_layouts(Sizes())
    assert equal(as_native(published, published, rules=()), published)
    assert equal(to_original((), held(published)), published)


def test_rows_of_a_fused_tensor_go_to_its_parts_in_order():
    fused = torch.arange(8.0).view(4, 2)
    rules = (Fused("qkv", ("q", "k", "v")),)
    made = to_native(rules, held({"qkv": fused}), {"v": (1, 2), "q": (2, 2), "k": (1, 2)}, "here")
    assert made["q"].read().tolist() == [[0, 1], [2, 3]]
    assert made["k"].read().tolist() == [[4, 5]]
    assert made["v"].read().tolist() == [[6, 7]]


def test_experts_are_stacked_in_the_order_of_their_numbers_not_of_their_names():
    published = {f"experts.{number}.w": torch.full((1, 2), float(number)) for number in reversed(range(12))}
    rules = (Stacked(("experts.{e}.w",), "w"),)
    made = to_native(rules, held(published), {"w": (12, 1, 2)}, "here")
    assert made["w"].read()[:, 0, 0].tolist() == list(range(12))


def test_each_expert_is_its_gate_above_its_up_projection():
    published = {
        f"mlp.experts.{number}.{name}_proj.weight": torch.full((1, 2), number + shift)
        for number in range(2)
        for name, shift in [("gate", 0.0), ("up", 0.5)]
    }
    made = to_native(experts("mlp"), held(published), {"mlp.experts.gate_up_proj": (2, 2, 2)}, "here")
    assert made["mlp.experts.gate_up_proj"].read()[:, :, 0].tolist() == [[0.0, 0.5], [1.0, 1.5]]


def test_a_checkpoint_that_holds_its_experts_stacked_is_taken_as_it_is():
    published, native = both_layouts(Sizes())
    mixed = {name: tensor for name, tensor in published.items() if ".experts." not in name}
    mixed |= {name: tensor for name, tensor in native.items() if ".experts." in name}
    assert equal(as_native(mixed, native), native)


def test_experts_may_be_stacked_in_one_layer_and_single_in_another():
    published, native = both_layouts(Sizes())
    mixed = {name: tensor for name, tensor in published.items() if not name.startswith("model.layers.1.mlp.experts")}
    mixed |= {name: tensor for name, tensor in native.items() if name.startswith("model.layers.1.mlp.experts")}
    assert equal(as_native(mixed, native), native)


# --- names


@pytest.mark.parametrize("number", ["x", "1x", "", "-1", "1.0", "0.1"])
def test_a_placeholder_stands_for_a_whole_number_only(number):
    name = f"layers.{number}.w"
    rules = (Rename("blocks.{i}.w", "layers.{i}.w"),)
    assert list(to_original(rules, held({name: torch.ones(1)}))) == [name]
    assert list(to_native(rules, held({name: torch.ones(1)}), {name: (1,)}, "here")) == [name]


@pytest.mark.parametrize("number", ["0", "7", "10", "123"])
def test_a_placeholder_keeps_its_number(number):
    rules = (Rename("blocks.{i}.w", "layers.{i}.w"),)
    assert list(to_original(rules, held({f"layers.{number}.w": torch.ones(1)}))) == [f"blocks.{number}.w"]


def test_several_placeholders_keep_their_numbers_apart():
    rules = (Rename("b{j}.{i}", "a{i}.{j}"),)
    published = {"b2.1": torch.zeros(1), "b1.2": torch.ones(1)}
    made = to_native(rules, held(published), {"a1.2": (1,), "a2.1": (1,)}, "here")
    assert equal(made, {"a1.2": torch.zeros(1), "a2.1": torch.ones(1)})


@pytest.mark.parametrize(
    "name", ["a.b", "a+b", "(a)", "[a]", "a|b", "^a$", "a*", "a?", "\\d", "{12}", "{x", "$1", "ä b"]
)
def test_names_mean_themselves_whatever_characters_they_have(name):
    published, native = {f"old/{name}": torch.zeros(2)}, {name: torch.zeros(2)}
    rules = (Rename(f"old/{name}", name),)
    assert equal(to_original(rules, held(native)), published)
    assert equal(as_native(published, native, rules), native)


@pytest.mark.parametrize("other", ["aXb", "a.bc", "xa.b", "a.b\n", "A.B"])
def test_a_rule_is_for_its_whole_name_and_no_other(other):
    assert list(to_original((Rename("old", "a.b"),), held({other: torch.zeros(1)}))) == [other]


def test_the_first_rule_that_names_a_tensor_wins():
    rules = (Rename("special", "layers.0.w"), Rename("blocks.{i}.w", "layers.{i}.w"))
    made = to_original(rules, held({"layers.0.w": torch.zeros(1), "layers.1.w": torch.ones(1)}))
    assert equal(made, {"special": torch.zeros(1), "blocks.1.w": torch.ones(1)})


# --- tied tensors


def test_a_tied_tensor_may_be_absent():
    native = {"embed": torch.ones(2), "head": torch.ones(2)}
    made = as_native({"embed": torch.ones(2)}, native, (), tied={"head": "embed"})
    assert list(made) == ["embed"]


def test_a_tied_tensor_that_is_there_is_left_out_if_it_is_the_same_and_refused_if_not():
    native = {"embed": torch.ones(2), "head": torch.ones(2)}
    rules, tied = (Rename("ff_out", "head"),), {"head": "embed"}
    assert list(as_native({"embed": torch.ones(2), "ff_out": torch.ones(2)}, native, rules, tied=tied)) == ["embed"]
    with pytest.raises(ModelError, match="ties 'head' to 'embed', but the weights hold two different tensors"):
        as_native({"embed": torch.ones(2), "ff_out": torch.zeros(2)}, native, rules, tied=tied)


def test_only_tied_tensors_may_be_absent():
    with pytest.raises(ModelError, match="1 tensors are missing from the weights, first 'embed'"):
        as_native({}, {"embed": torch.ones(2), "head": torch.ones(2)}, (), tied={"head": "embed"})


# --- what is refused, by its published name


def refused(published: Tensors, native: Tensors, rules=RULES) -> str:
    with pytest.raises(ModelError) as error:
        as_native(published, native, rules)
    assert str(error.value).startswith("here: ")
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize("name", sorted(both_layouts(Sizes(layers=1))[0]))
def test_a_missing_tensor_is_named_as_published_and_counted_once(name):
    published, native = both_layouts(Sizes(layers=1))
    total = len(published)
    del published[name]
    assert (
        refused(published, native) == f"here: 1 tensors are missing from the weights, first {name!r}; "
        f"found {total - 1}, expected {total}"
    )


def test_all_missing_tensors_are_counted():
    published, native = both_layouts(Sizes(layers=3, bias=False))
    kept = {name: tensor for name, tensor in published.items() if "blocks.1." not in name}
    assert len(kept) == len(published) - 2
    assert "2 tensors are missing from the weights, first 'blocks.1." in refused(kept, native)


def test_a_whole_missing_mlp_is_named_by_its_first_expert():
    published, native = both_layouts(Sizes(layers=1))
    kept = {name: tensor for name, tensor in published.items() if ".mlp." not in name}
    said = refused(kept, native)
    assert "9 tensors are missing from the weights, first 'model.layers.0.mlp.experts.0.gate_proj.weight'" in said


@pytest.mark.parametrize(
    "name",
    [
        "model.layers.9.self_attn.o_proj.weight",
        "blocks.2.att_proj.weight",
        "model.layers.0.mlp.experts.3.up_proj.weight",
    ],
)
def test_a_tensor_without_a_place_is_named_with_its_shape(name):
    published, native = both_layouts(Sizes())
    said = refused(published | {name: torch.zeros(3, 2)}, native)
    assert f"1 tensors have no place in the model, first {name!r} [3, 2]" in said


def test_a_tensor_that_is_there_under_both_names_is_left_over():
    published, native = both_layouts(Sizes())
    name = "model.embed_tokens.weight"
    assert f"1 tensors have no place in the model, first {name!r}" in refused(published | {name: native[name]}, native)


def test_experts_that_are_there_stacked_and_single_are_left_over():
    published, native = both_layouts(Sizes(layers=1))
    name = "model.layers.0.mlp.experts.down_proj"
    said = refused(published | {name: native[name]}, native)
    assert "3 tensors have no place in the model, first 'model.layers.0.mlp.experts.0.down_proj.weight' [4, 2]" in said


def test_an_expert_more_than_the_config_says_is_left_over():
    published, _ = both_layouts(Sizes(layers=1, experts=4))
    _, native = both_layouts(Sizes(layers=1, experts=3))
    assert "3 tensors have no place in the model, first 'model.layers.0.mlp.experts.3." in refused(published, native)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("wte.weight", [5, 4]),
        ("model.norm.weight", [4]),
        ("blocks.0.attn_out.weight", [4, 6]),
        ("blocks.0.att_proj.weight", [12, 4]),
        ("blocks.0.att_proj.bias", [12]),
        ("model.layers.0.mlp.experts.0.gate_proj.weight", [2, 4]),
        ("model.layers.0.mlp.experts.2.up_proj.weight", [2, 4]),
        ("model.layers.0.mlp.experts.1.down_proj.weight", [4, 2]),
    ],
)
@pytest.mark.parametrize("wrong", [(7, 3), (1,), ()], ids=str)
def test_a_tensor_of_another_shape_is_named_with_both_shapes(name, expected, wrong):
    published, native = both_layouts(Sizes(layers=1))
    said = refused(published | {name: torch.zeros(wrong)}, native)
    assert f"tensor {name!r} has the shape {list(wrong)}; config.json asks for {expected}" in said


@pytest.mark.parametrize(
    "name", ["wte.weight", "blocks.0.att_proj.weight", "model.layers.0.mlp.experts.1.up_proj.weight"]
)
def test_a_transposed_tensor_is_refused_though_it_has_as_many_numbers(name):
    published, native = both_layouts(Sizes(layers=1))
    published[name] = published[name].T.contiguous()
    assert f"tensor {name!r} has the shape {list(published[name].shape)}; config.json asks for" in refused(
        published, native
    )


def test_stacked_experts_of_another_shape_are_named_with_both_shapes():
    native = {"mlp.experts.down_proj": torch.zeros(3, 4, 2)}
    said = refused({"mlp.experts.down_proj": torch.zeros(2, 4, 2)}, native, experts("mlp"))
    assert "tensor 'mlp.experts.down_proj' has the shape [2, 4, 2]; config.json asks for [3, 4, 2]" in said


def test_experts_of_different_types_are_refused():
    published, native = both_layouts(Sizes(layers=1))
    name = "model.layers.0.mlp.experts.1.up_proj.weight"
    published[name] = published[name].bfloat16()
    said = refused(published, native)
    assert "the tensors of 'model.layers.0.mlp.experts.gate_up_proj' have different types" in said
    assert "torch.bfloat16" in said and "torch.float32" in said


def test_tensors_of_their_own_may_have_their_own_types():
    published, native = both_layouts(Sizes(layers=1))
    published["model.norm.weight"] = native["model.norm.weight"] = published["model.norm.weight"].double()
    assert equal(as_native(published, native), native)


def test_parts_of_different_types_are_never_joined_into_one_tensor():
    _, native = both_layouts(Sizes(layers=1))
    name = "model.layers.0.self_attn.k_proj.weight"
    with pytest.raises(ModelError, match="different types"):
        to_original(RULES, held(native | {name: native[name].bfloat16()}))


# --- the summary


def test_the_summary_counts_the_native_tensors_of_each_rule_and_those_that_keep_their_names():
    _, native = both_layouts(Sizes(layers=2))
    mlp, attention = "model.layers.{i}.mlp.experts", ATTENTION
    assert summary(RULES, native) == [
        ("wte.weight", "model.embed_tokens.weight", 1),
        ("blocks.{i}.attn_out.weight", f"{attention}.o_proj.weight", 2),
        ("blocks.{i}.att_proj.weight", " + ".join(f"{attention}.{part}.weight" for part in QKV), 6),
        ("blocks.{i}.att_proj.bias", " + ".join(f"{attention}.{part}.bias" for part in QKV), 6),
        (f"{mlp}.{{e}}.gate_proj.weight + {mlp}.{{e}}.up_proj.weight", f"{mlp}.gate_up_proj", 2),
        (f"{mlp}.{{e}}.down_proj.weight", f"{mlp}.down_proj", 2),
        ("(any other name)", "(the same)", 1),
    ]


def test_the_summary_leaves_out_rules_that_nothing_needs():
    _, native = both_layouts(Sizes(layers=1, bias=False))
    lines = summary(RULES, native)
    assert not any("bias" in original for original, _, _ in lines)
    assert sum(count for *_, count in lines) == len(native)
    assert summary(RULES, ["model.embed_tokens.weight"]) == [("wte.weight", "model.embed_tokens.weight", 1)]


def test_mapping_reads_nothing():
    class Unreadable(HeldTensor):
        def read_into(self, target, start=0):
            raise AssertionError("read")

    published, native = both_layouts(Sizes())
    made = to_native(RULES, {name: Unreadable(tensor) for name, tensor in published.items()}, shapes(native), "here")
    assert {name: tensor.shape for name, tensor in to_original(RULES, made).items()} == shapes(published)
    with pytest.raises(AssertionError, match="read"):
        whole(made["model.norm.weight"]).read()
