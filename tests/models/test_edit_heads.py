"""Edit heads: those of the reference, and new ones on any family."""

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from dllm_ray.errors import ModelError
from dllm_ray.models import convert, edit_heads
from dllm_ray.models.adapters import add_adapter, add_lora, merge
from dllm_ray.models.config import LoRAConfig
from dllm_ray.models.load import load
from dllm_ray.models.probe import unused_parameters

FAMILIES = ("modernbert", "llada", "dream", "a2d_qwen3", "a2d_qwen2", "llada_moe", "llada2")


@pytest.fixture
def recorded(golden):
    return np.load(golden / "editflow_modernbert" / "forward.npz")


def said(lm, ids: torch.Tensor, mask: torch.Tensor | None = None, t: float = 0.5):
    """Rates [B, T, 3], and log-probabilities of token 5 in every place, [B * T] each."""
    everywhere = torch.arange(ids.numel())
    fives = torch.full_like(everywhere, 5)
    with torch.no_grad():
        return lm.edits(ids, mask, torch.full((len(ids),), t), everywhere, fives, everywhere, fives)


def test_the_recorded_rates_and_logits(recorded, golden_lm):
    lm = golden_lm("editflow_modernbert")
    ids, mask = torch.from_numpy(recorded["ids"]).long(), torch.from_numpy(recorded["attn"]).long()
    with torch.no_grad():
        hidden = lm.module.hidden(ids, mask)
        rates = lm.module.heads.rates_of(hidden, shift=False)
        logits = {"sub": lm.module.heads.substitute(hidden), "ins": lm.module.heads.insert(hidden)}
    tokens = mask.bool()
    for number, name in enumerate(("sub", "del", "ins")):
        expected = torch.from_numpy(recorded[f"{name}_rate_hat"])
        torch.testing.assert_close(rates[..., number][tokens], expected[tokens], rtol=0, atol=1e-5)
    for name, found in logits.items():
        torch.testing.assert_close(
            found[tokens], torch.from_numpy(recorded[f"{name}_logits"])[tokens], rtol=0, atol=1e-4
        )


def test_the_published_layout_is_written_back_bit_for_bit(golden, tmp_path):
    (tmp_path / "native").mkdir()
    (tmp_path / "back").mkdir()
    source = golden / "editflow_modernbert" / "checkpoint"
    convert.to_native(str(source), tmp_path / "native", convert.Target())
    convert.to_original(str(tmp_path / "native"), tmp_path / "back")
    before, after = (load_file(folder / "model.safetensors") for folder in (source, tmp_path / "back"))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_gets_heads_that_start_from_its_own(golden, tmp_path, name):
    (tmp_path / "edits").mkdir()
    convert.to_native(str(golden / name / "checkpoint"), tmp_path / "edits", convert.Target("editflow"))
    lm, before = load(tmp_path / "edits"), load(golden / name / "checkpoint")
    ids = torch.tensor([[1, 20, 30, 40, 50, 60]])
    rates, substitutes, inserts = said(lm, ids)
    with torch.no_grad():
        logits = before.logits(ids, shift=False)[0].log_softmax(-1)[:, 5]
    assert before.spec.attention == "full" or lm.spec.attention == "full"
    if before.spec.attention == "full":
        torch.testing.assert_close(inserts, logits, rtol=0, atol=1e-4)
        if lm.spec.shift_logits:
            torch.testing.assert_close(substitutes[1:], logits[:-1], rtol=0, atol=1e-4)
            assert substitutes[0].item() == pytest.approx(-np.log(lm.module.heads.substitute.out_features), abs=1e-5)
            assert rates[0, 0, :2].tolist() == [0.0, 0.0] and rates[0, 0, 2] > 0
        else:
            torch.testing.assert_close(substitutes, logits, rtol=0, atol=1e-4)
    assert lm.spec.edit_heads == {"time": False, "reads": None} and lm.spec.block_size is None
    head = {id(p) for p in lm.model.get_output_embeddings().parameters()} - {id(lm.model.get_input_embeddings().weight)}
    unused = {id(lm.model.get_parameter(name)) for name in unused_parameters(lm.model)}
    assert unused == head


@pytest.mark.parametrize("architecture", ["bert", "roberta", "distilbert", "llama", "gpt2"])
def test_ordinary_models_too_and_padding_is_not_seen(make_lm, architecture, tmp_path):
    lm = edit_heads.attach(make_lm(architecture), seed=3)
    lm.save(tmp_path)
    again = load(tmp_path)
    ids = torch.randint(10, 200, (2, 9), generator=torch.Generator().manual_seed(0))
    mask = torch.tensor([[1] * 9, [1] * 5 + [0] * 4])
    for found, expected in zip(said(again, ids, mask), said(lm, ids, mask), strict=True):
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)
    rates, alone = said(lm, ids, mask)[0][1, :5], said(lm, ids[1:, :5])[0][0]
    torch.testing.assert_close(rates, alone, rtol=0, atol=1e-5)


def test_the_vocabulary_matrix_of_the_model_reads_nothing(make_lm):
    lm, seen = edit_heads.attach(make_lm("bert")), []
    hook = lm.model.get_output_embeddings().register_forward_hook(lambda _m, _i, output: seen.append(output.shape))
    said(lm, torch.tensor([[1, 2, 3]]))
    hook.remove()
    assert [shape[1] for shape in seen] == [0]


def test_heads_that_know_the_time_begin_without_it_and_learn_it(make_lm, tmp_path):
    lm = edit_heads.attach(make_lm("bert"), time=True)
    ids = torch.tensor([[1, 20, 30]])
    assert torch.equal(said(lm, ids, t=0.1)[0], said(lm, ids, t=0.9)[0])
    torch.nn.init.normal_(lm.model.edit_heads.time[2].weight)
    lm.save(tmp_path)
    early, late = (said(load(tmp_path), ids, t=t)[0] for t in (0.1, 0.9))
    assert not torch.allclose(early, late)
    with pytest.raises(ModelError, match="give t"):
        lm.module.heads.at_time(torch.zeros(1, 2, 32), None)


def test_an_adapter_trains_the_heads_whole(make_lm, tmp_path):
    lm = edit_heads.attach(make_lm("llama"))
    lm.save(tmp_path / "base")
    adapted = add_lora(load(tmp_path / "base"), LoRAConfig(rank=2), seed=0)
    trained = {name for name, parameter in adapted.model.named_parameters() if parameter.requires_grad}
    assert any("edit_heads.modules_to_save" in name for name in trained)
    assert not any("edit_heads" in name and "lora_" in name for name in trained)
    ids = torch.tensor([[1, 20, 30, 40]])
    rates, _, inserts = adapted.edits(
        ids, None, torch.zeros(1), torch.tensor([1]), torch.tensor([3]), torch.tensor([2]), torch.tensor([4])
    )
    (rates.sum() + inserts.sum()).backward()
    with torch.no_grad():
        for parameter in adapted.model.parameters():
            if parameter.grad is not None:
                parameter -= 0.5 * parameter.grad + 0.01
    adapted.save(tmp_path / "adapter")
    again = add_adapter(load(tmp_path / "base"), str(tmp_path / "adapter"))
    merged = merge(add_adapter(load(tmp_path / "base"), str(tmp_path / "adapter")))
    changed = said(adapted, ids)[0]
    assert not torch.allclose(changed, said(lm, ids)[0])
    for other in (again, merged):
        torch.testing.assert_close(said(other, ids)[0], changed, rtol=0, atol=1e-5)


def test_heads_have_no_place_in_the_layout_of_a_family_without(golden, tmp_path):
    (tmp_path / "edits").mkdir()
    (tmp_path / "back").mkdir()
    convert.to_native(str(golden / "llada" / "checkpoint"), tmp_path / "edits", convert.Target("editflow"))
    with pytest.raises(ModelError, match="has edit heads, for which the published layout of llada has no place"):
        convert.to_original(str(tmp_path / "edits"), tmp_path / "back")


def test_what_can_not_be(make_lm, golden, tmp_path):
    lm = edit_heads.attach(make_lm("bert"))
    with pytest.raises(ModelError, match="has edit heads already"):
        edit_heads.attach(lm)
    lm.save(tmp_path)
    (tmp_path / "out").mkdir()
    with pytest.raises(ModelError, match="can't be converted to mdlm"):
        convert.to_native(str(tmp_path), tmp_path / "out", convert.Target("mdlm"))
    with pytest.raises(ModelError, match="without an adapter"):
        edit_heads.attach(add_lora(make_lm("llama"), LoRAConfig(rank=2), seed=0))
    tensors = dict(lm.model.edit_heads.state_dict())
    del tensors["rates.bias"]
    with pytest.raises(ModelError, match=r"rates\.bias"):
        edit_heads.put(make_lm("bert").model, lm.spec.edit_heads, tensors)
    with pytest.raises(ModelError, match=r"shape \[3, 3\]; expected \[3, 32\]"):
        edit_heads.put(
            make_lm("bert").model,
            lm.spec.edit_heads,
            dict(lm.model.edit_heads.state_dict()) | {"rates.weight": torch.zeros(3, 3)},
        )


def test_tokens_that_the_model_gains_start_as_the_mean(make_lm):
    lm = edit_heads.attach(make_lm("bert"))
    tensors = {name: tensor.clone() for name, tensor in lm.model.edit_heads.state_dict().items()}
    rows = len(tensors["insert.weight"]) - 2
    short = {name: tensor[:rows] if "rates" not in name else tensor for name, tensor in tensors.items()}
    edit_heads.put(lm.model, lm.spec.edit_heads, short)
    torch.testing.assert_close(lm.model.edit_heads.insert.weight[rows], short["insert.weight"].mean(dim=0))
