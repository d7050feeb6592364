"""The probe: it finds what a decoder's attention does wrong, whatever its config says, and lets good ones pass."""

import copy

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from dllm_ray.errors import ModelError
from dllm_ray.models import probe
from dllm_ray.models.lm import LogitsModule

SIZES = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}


def config(is_causal: bool = False, **extra) -> LlamaConfig:
    made = LlamaConfig(**(SIZES | {"vocab_size": 260, "max_position_embeddings": 64} | extra))
    made.is_causal = is_causal
    return made


def model(model_class: type = LlamaForCausalLM, **extra):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return model_class(config(**extra)).eval()


# --- models that misbehave, each in one way


class OneBlind(LlamaForCausalLM):
    """The first position doesn't see the sixth."""

    def forward(self, input_ids, attention_mask=None, **options):
        if attention_mask is None:
            width = input_ids.shape[1]
            attention_mask = torch.ones((len(input_ids), 1, width, width), dtype=torch.bool)
            attention_mask[:, :, :, 5] = False
            attention_mask[:, :, 5, 5] = True
        return super().forward(input_ids=input_ids, attention_mask=attention_mask, **options)


class PaddingLeaks(LlamaForCausalLM):
    """A mask of padding is dropped."""

    def forward(self, input_ids, attention_mask=None, **options):
        if attention_mask is not None and attention_mask.dim() == 2:
            attention_mask = None
        return super().forward(input_ids=input_ids, attention_mask=attention_mask, **options)


class PaddingIsNaN(LlamaForCausalLM):
    """Rows with padding come out as NaN."""

    def forward(self, input_ids, attention_mask=None, **options):
        output = super().forward(input_ids=input_ids, attention_mask=attention_mask, **options)
        if attention_mask is not None and attention_mask.dim() == 2:
            output.logits = output.logits * float("nan")
        return output


class MaskIgnored(LlamaForCausalLM):
    """A pattern of attention is dropped."""

    def forward(self, input_ids, attention_mask=None, **options):
        if attention_mask is not None and attention_mask.dim() == 4:
            attention_mask = None
        return super().forward(input_ids=input_ids, attention_mask=attention_mask, **options)


class MaskMadeCausal(LlamaForCausalLM):
    """A pattern of attention is cut down to its causal part."""

    def forward(self, input_ids, attention_mask=None, **options):
        if attention_mask is not None and attention_mask.dim() == 4:
            attention_mask = attention_mask.tril()
        return super().forward(input_ids=input_ids, attention_mask=attention_mask, **options)


class MaskTransposed(LlamaForCausalLM):
    """Queries and keys change places in a pattern of attention."""

    def forward(self, input_ids, attention_mask=None, **options):
        if attention_mask is not None and attention_mask.dim() == 4:
            attention_mask = attention_mask.transpose(2, 3)
        return super().forward(input_ids=input_ids, attention_mask=attention_mask, **options)


class MaskRefused(LlamaForCausalLM):
    """A pattern of attention raises an error of many lines."""

    def forward(self, input_ids, attention_mask=None, **options):
        if attention_mask is not None and attention_mask.dim() == 4:
            raise ValueError("too many dimensions\n  in a mask")
        return super().forward(input_ids=input_ids, attention_mask=attention_mask, **options)


CAUSAL = "attention stays causal (or misses positions) although config.is_causal is false"
PADDING = "padding that is masked out changes the logits"
MASK = "a block-causal mask is not taken as it is given"
MISBEHAVING = [
    (OneBlind, CAUSAL),
    (PaddingLeaks, PADDING),
    (PaddingIsNaN, PADDING),
    (MaskIgnored, MASK),
    (MaskMadeCausal, MASK),
    (MaskTransposed, MASK),
]


def refused(check, *arguments) -> str:
    with pytest.raises(ModelError) as error:
        check(*arguments)
    assert "\n" not in str(error.value)
    return str(error.value)


# --- what passes and what doesn't


def test_a_bidirectional_decoder_passes():
    probe.check_attention(model())
    probe.check_architecture(LlamaForCausalLM, config(), "here")


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_either_implementation_of_attention_passes(implementation):
    made = config()
    made._attn_implementation = implementation
    probe.check_attention(LlamaForCausalLM(made).eval())


def test_a_causal_decoder_is_refused():
    said = refused(probe.check_attention, model(is_causal=True))
    assert said.startswith(f"LlamaForCausalLM: {CAUSAL}")
    assert CAUSAL in refused(probe.check_architecture, LlamaForCausalLM, config(is_causal=True), "here")


@pytest.mark.parametrize(("model_class", "said"), MISBEHAVING, ids=lambda value: getattr(value, "__name__", ""))
def test_a_decoder_that_misbehaves_is_refused_by_name_with_the_reason(model_class, said):
    said = f"{model_class.__name__}: {said}"
    assert refused(probe.check_attention, model(model_class)).startswith(said)
    assert refused(probe.check_architecture, model_class, config(), "here").startswith(f"here: {said}")


def test_the_refusal_says_by_how_much_padding_leaks():
    found = refused(probe.check_attention, model(PaddingLeaks))
    assert float(found.rpartition("(by ")[2].rstrip(")")) > 1e-3
    assert "(by nan)" in refused(probe.check_attention, model(PaddingIsNaN))


def test_an_architecture_that_fails_is_refused_with_the_first_line_of_its_error():
    said = "here: MaskRefused can't be run as a diffusion model: ValueError while its attention was checked: "
    assert refused(probe.check_architecture, MaskRefused, config(), "here") == said + "too many dimensions"


def test_an_architecture_that_cannot_be_built_is_refused():
    class Unbuildable(LlamaForCausalLM):
        def __init__(self, config):
            raise RuntimeError

    said = "here: Unbuildable can't be run as a diffusion model: RuntimeError while its attention was checked: "
    assert refused(probe.check_architecture, Unbuildable, config(), "here") == f"{said}RuntimeError"


def test_a_window_that_the_canvas_is_wider_than_is_found():
    from transformers import MistralConfig, MistralForCausalLM

    narrow = MistralConfig(**SIZES, vocab_size=260, num_key_value_heads=2, sliding_window=4, head_dim=16)
    narrow.is_causal = False
    assert CAUSAL in refused(probe.check_architecture, MistralForCausalLM, narrow, "here")


@pytest.mark.parametrize("vocab_size", [8, 64, 65, 1000])
def test_any_vocabulary_will_do(vocab_size):
    probe.check_attention(model(vocab_size=vocab_size))
    assert CAUSAL in refused(probe.check_attention, model(vocab_size=vocab_size, is_causal=True))


# --- the copy


def built(model_class: type, given):
    """The config of the copy that `check_architecture` makes."""
    seen = []

    class Watched(model_class):
        def __init__(self, config):
            seen.append(copy.deepcopy(config))
            super().__init__(config)

    probe.check_architecture(Watched, given, "here")
    (small,) = seen
    return small


def test_the_copy_is_small_and_the_config_stays_as_it_was():
    given = config(vocab_size=100_000, num_hidden_layers=50, pad_token_id=99_999, eos_token_id=[7, 99_998])
    before = copy.deepcopy(given.to_dict())
    small = built(LlamaForCausalLM, given)
    assert given.to_dict() == before
    assert given.is_causal is False
    assert (small.num_hidden_layers, small.vocab_size) == (2, 64)
    assert small.hidden_size == given.hidden_size


def test_the_kinds_of_layers_are_cut_with_the_layers():
    from transformers import Qwen3Config, Qwen3ForCausalLM

    deep = Qwen3Config(**(SIZES | {"num_hidden_layers": 6}), vocab_size=260, num_key_value_heads=2, head_dim=16)
    deep.is_causal = False
    assert len(deep.layer_types) == 6
    assert built(Qwen3ForCausalLM, deep).layer_types == ["full_attention"] * 2


def test_a_model_of_one_layer_stays_one():
    probe.check_architecture(LlamaForCausalLM, config(num_hidden_layers=1), "here")


def test_checking_leaves_random_numbers_and_the_model_as_they_were():
    checked = model()
    weights = copy.deepcopy(checked.state_dict())
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    probe.check_architecture(LlamaForCausalLM, config(), "here")
    probe.check_attention(checked)
    assert torch.equal(torch.rand(3), expected)
    assert all(torch.equal(checked.state_dict()[name], tensor) for name, tensor in weights.items())
    assert all(parameter.grad is None for parameter in checked.parameters())


# --- the measure


class Mixer(nn.Module):
    """Logits of a row are the sum over columns of a matrix times what the token there is."""

    def __init__(self, matrix: torch.Tensor):
        super().__init__()
        self.embeddings = nn.Embedding.from_pretrained(torch.arange(64.0).unsqueeze(1))
        self.matrix = matrix
        self.model = self

    def get_input_embeddings(self):
        return self.embeddings

    def forward(self, input_ids, attention_mask=None):
        matrix = self.matrix if attention_mask is None else self.matrix * attention_mask[0, 0]
        return matrix @ self.embeddings(input_ids)


@pytest.mark.parametrize("seed", range(5))
def test_influence_is_who_changes_with_whom(seed):
    generator = torch.Generator().manual_seed(seed)
    sees = torch.rand((7, 7), generator=generator) < 0.5
    ids = torch.randint(0, 64, (1, 7), generator=generator)
    assert torch.equal(probe.influence(Mixer(sees.float()), ids, None), sees)
    mask = torch.rand((1, 1, 7, 7), generator=generator) < 0.5
    assert torch.equal(probe.influence(Mixer(sees.float()), ids, mask), sees & mask[0, 0])


def test_influence_of_the_last_token_of_the_vocabulary_counts():
    ids = torch.full((1, 4), 63)
    assert probe.influence(Mixer(torch.ones(4, 4)), ids, None).all()


@pytest.mark.parametrize("width", [1, 5, 12])
def test_rows_see_columns_not_the_other_way_round(width):
    ids = torch.arange(width).unsqueeze(0)
    seen = probe.influence(LogitsModule(model(is_causal=True)), ids, None)
    assert torch.equal(seen, torch.ones(width, width).tril().bool())


def test_a_model_that_says_nothing_new_has_no_influence():
    silent = model()
    nn.init.zeros_(silent.lm_head.weight)
    assert not probe.influence(LogitsModule(silent), torch.arange(5).unsqueeze(0), None).any()
    assert CAUSAL in refused(probe.check_attention, silent)


# --- the quick check of every load


def test_the_quick_check_tells_causal_from_bidirectional():
    probe.check_bidirectional(model())
    assert CAUSAL in refused(probe.check_bidirectional, model(is_causal=True))


# --- what training asks


class GoesByPlace(LlamaForCausalLM):
    """Positions that it is told are dropped."""

    def forward(self, input_ids, position_ids=None, **options):
        return super().forward(input_ids=input_ids, **options)


def test_architectures_that_go_by_positions_and_see_no_padding_pass(make_lm):
    for architecture in ("bert", "roberta", "modernbert", "qwen3"):
        probe.check_training(make_lm(architecture).model, padded=True, positions=True)


def test_one_that_goes_by_places_is_found_out(make_lm):
    for found, name in ((model(GoesByPlace), "GoesByPlace"), (make_lm("mpnet").model, "MPNetForMaskedLM")):
        with pytest.raises(ModelError, match=rf"{name} goes by places in the row .* without data.packing"):
            probe.check_training(found, padded=False, positions=True)
        probe.check_training(found, padded=False, positions=False)


def test_one_that_sees_padding_is_found_out():
    with pytest.raises(ModelError, match=r"PaddingLeaks sees padding that is masked out .* data.padding eos"):
        probe.check_training(model(PaddingLeaks), padded=True, positions=False)


def test_one_that_takes_no_such_mask_is_found_out(make_lm):
    with pytest.raises(ModelError, match="BloomForCausalLM takes no masks as training needs them: ValueError"):
        probe.check_training(make_lm("bloom").model, padded=False, positions=True)


def test_parameters_that_no_logits_come_from_are_named(make_lm):
    assert probe.unused_parameters(make_lm("qwen3").model) == []
    pooler = ["bert.pooler.bias", "bert.pooler.weight"]
    assert sorted(probe.unused_parameters(make_lm("big_bird").model)) == pooler


class Rounded(Mixer):
    """Rounds batches of every size in another way, as kernels of some processors do."""

    def forward(self, input_ids, attention_mask=None):
        return super().forward(input_ids, attention_mask) * (1 + 3e-7 * len(input_ids))


def test_rounding_that_depends_on_the_shape_of_a_batch_is_no_influence():
    seen = probe.influence(Rounded(torch.eye(6)), torch.arange(6).unsqueeze(0), None)
    assert torch.equal(seen, torch.eye(6, dtype=torch.bool))
