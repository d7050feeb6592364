"""Token for token what the reference's samplers write, step by step, at temperature 0: every recorded history.

Where ours differs on purpose, a test of its own says from which step on, and why.
"""

import json
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import numpy as np
import pytest

from dllm_ray.models.lm import DiffusionLM
from dllm_ray.sampling import SampleOutput, Sampler, SamplerConfig

CASES = {
    "llada/mdlm": "half_steps_b32 b8_s32 b8_s10_ceil b12_lastpartial_s32 cfg05_keep_b32_s16 suppress5_b32_s32 "
    "maxlen48_uneq cosine_b32_s16 infill_b8_s16 infill_cfg1_b16_s8",
    "llada/fastdllm": "None_fixed_s32 None_thr09_s32 None_thr05_s32 None_thr02_s32 None_thr01_b16_s32 None_factor2_s32 "
    "prefix_fixed_s32 prefix_fixed_s16 prefix_thr09_s32 prefix_thr01_b16_s32 prefix_factor1_s8 prefix_factor2_s32 "
    "dual_fixed_s16 dual_thr02_s32 dual_factor2_s32",
    "llada_moe/mdlm": "half_steps_b32 b8_s10_ceil b12_lastpartial_s32 uneq_b16_s16 suppress5_b32_s32 maxlen48_uneq "
    "cosine_b32_s16 infill_bNone_s8 infill_b8_s16 infill_cfg1_b16_s8",
    "modernbert/mdlm": "full_b32 b8_s32 b8_s10_ceil b12_lastpartial_s32 uneq_b16_s16 cfg05_keep_b32_s16 maxlen48_uneq "
    "infill_bNone_s8 infill_b8_s16 infill_cfg1_b16_s8",
    "a2d_qwen3/mdlm": "full_b32 half_steps_b32 b8_s10_ceil b12_lastpartial_s32 uneq_b16_s16 suppress5_b32_s32 "
    "maxlen48_uneq infill_bNone_s8 infill_cfg1_b16_s8",
    "a2d_qwen3/bd3lm": "b8_n32_uneq b16_n32_uneq_s8 b8_n20_lastpartial b8_n16_cfg1 b32_n64 shift_b8_n32_s16 "
    "shift_b8_n32_uneq",
    "a2d_qwen2/mdlm": "half_steps_b32 b8_s32 uneq_b16_s16 cfg05_keep_b32_s16 suppress5_b32_s32 cosine_b32_s16 "
    "infill_bNone_s8 infill_b8_s16 infill_cfg1_b16_s8",
    "a2d_qwen2/bd3lm": "b8_n32_s16 b16_n32_uneq_s8 b8_n20_lastpartial b32_n64 shift_b16_n32_uneq_s8 "
    "shift_b8_n20_lastpartial shift_b8_n16_cfg1 shift_b32_n64",
    "dream/dream": "entropy_s32 entropy_s12 entropy_uneq_s16 maskgit_plus_s32 maskgit_plus_s12 topk_margin_s32 "
    "topk_margin_s12 topk_margin_uneq_s16 maskgit_topk50_topp09_s16 entropy_topk50_s16 entropy_cfg1_uneq_s16 "
    "entropy_noshift_s16 infill_entropy_s8 infill_maskgit_s16",
    "dream/fastdllm": "None_entropy_s16 None_maskgit_plus_s32 None_maskgit_plus_s16 None_entropy_s32_batch2 "
    "None_entropy_s32_uneq None_conf_thr0.2 prefix_entropy_s32 prefix_entropy_s16 prefix_entropy_s32_batch2 "
    "prefix_conf_thr0.9 dual_maskgit_plus_s32 dual_maskgit_plus_s16 dual_conf_thr0.5 dual_conf_thr0.2",
    "llada2/block": "b8_spb8 b8_spb4 b8_spb4_batch2 b8_thr05_batch2 b8_thr02 b8_thr02_batch2 b16_spb16_batch2 b8_eos "
    "b8_eos_batch2",
    "llada21/block": "b8 b8_thr03_ed02 b16_k2",
}
"""Cases that are the same from the first canvas to the last, by model and sampler."""

PROMPT_MASKS = ["llada", "a2d_qwen3", "a2d_qwen2"]
LEFT_BEHIND = ["dual_thr09_s8", "dual_factor1_s8"]
MASKS_WRITTEN = {"shift_b8_n32_spb8": 5, "shift_b8_n20_lastpartial": 5}
REFUSED = [
    ("llada", "fastdllm", "prefix_uneq_thr05"),
    ("llada", "fastdllm", "dual_uneq_thr05"),
    ("dream", "dream", "origin_s16"),
    ("dream", "fastdllm", "prefix_entropy_s32_uneq"),
    ("dream", "fastdllm", "dual_entropy_s32_batch2"),
    ("dream", "fastdllm", "dual_entropy_s32_uneq"),
]
APART = {
    ("llada", "mdlm", "begin_suppress5_b32_s16"),
    ("llada", "fastdllm", "None_uneq_thr05"),
    ("a2d_qwen2", "bd3lm", "b8_n32_uneq"),
    *((model, "mdlm", "prompt_contains_mask") for model in PROMPT_MASKS),
    *(("llada", "fastdllm", case) for case in LEFT_BEHIND),
    *(("a2d_qwen3", "bd3lm", case) for case in MASKS_WRITTEN),
    *REFUSED,
}
"""Cases with a test of their own."""

NAMES = {
    "scheduler": "schedule",
    "right_shift_logits": "shift_logits",
    "remasking": "policy",
    "alg": "policy",
    "use_cache": "cache",
}
DEFAULTS = {"mdlm": {"block_size": 128}, "bd3lm": {"cache": "block"}}


@dataclass
class Record:
    """One case of the reference, and our settings for it."""

    facts: dict
    config: SamplerConfig
    history: np.ndarray | None
    right_aligned: bool

    @property
    def prompts(self) -> list[list[int]]:
        return self.facts["inputs"]

    @property
    def infills(self) -> bool:
        return self.facts["method"] == "infill"

    @property
    def waits(self) -> bool:
        """Whether a row may wait, unchanged, for others that need more steps."""
        return self.infills or bool(self.config.threshold or self.config.factor)

    def theirs(self, row: int, length: int, mask: int) -> np.ndarray:
        """[steps + 1, length] canvases of a row, without filler."""
        canvases = self.history[:, row]
        canvases = canvases[:, canvases.shape[1] - length :] if self.right_aligned else canvases[:, :length]
        return np.where(canvases == -1, mask, canvases)


@cache
def recorded(folder: Path, model: str, kind: str) -> tuple[list[dict], dict[str, np.ndarray]]:
    path = folder / model / f"samplers_{kind}.json"
    return json.loads(path.read_text()), dict(np.load(path.with_suffix(".npz")))


def record(golden: Path, model: str, kind: str, case: str) -> Record:
    cases, histories = recorded(golden, model, kind)
    [facts] = [item for item in cases if item["case"] == case]
    fields = DEFAULTS.get(kind, {}) | ({"policy": model} if kind == "block" else {})
    fields |= {NAMES.get(name, name): value for name, value in facts["config"].items()}
    if fields.get("policy") == "confidence_threshold":  # ranks as maskgit_plus does
        fields["policy"] = "maskgit_plus"
    if fields.get("cache", "none") is None:
        fields["cache"] = "none"
    config = SamplerConfig(**fields | {"eos_early_stop": False})
    history = histories[case].astype(np.int64) if case in histories else None
    return Record(facts, config, history, right_aligned=kind == "bd3lm" or model == "dream")


def play(lm: DiffusionLM, case: Record) -> SampleOutput:
    sampler = Sampler(lm, case.config)
    return (sampler.infill if case.infills else sampler.sample)(case.prompts, trace=True)


def moved(canvases: np.ndarray) -> np.ndarray:
    """Canvases without those that equal the one before."""
    return canvases[np.r_[True, (canvases[1:] != canvases[:-1]).any(axis=1)]]


def agreement(ours: np.ndarray, theirs: np.ndarray) -> int:
    """How many canvases are the same before the first that differs."""
    both = min(len(ours), len(theirs))
    differ = (ours[:both] != theirs[:both]).any(axis=1)
    return int(differ.argmax()) if differ.any() else both


def fills_every_mask(lm: DiffusionLM, case: Record, out: SampleOutput) -> bool:
    pairs = zip(case.prompts, out.sequences, strict=True)
    return all(
        sequence[: len(prompt)] == prompt
        and len(sequence) == len(prompt) + case.config.max_new_tokens
        and lm.spec.mask_token_id not in sequence[len(prompt) :]
        for prompt, sequence in pairs
    )


def as_alone(lm: DiffusionLM, case: Record) -> list[list[int]]:
    seeds = Sampler(lm, case.config)._seeds(len(case.prompts), None)
    return [
        Sampler(lm, case.config).sample([prompt], seeds=[seed]).sequences[0]
        for prompt, seed in zip(case.prompts, seeds, strict=True)
    ]


@pytest.mark.parametrize(("where", "case"), [(where, case) for where, cases in CASES.items() for case in cases.split()])
def test_every_step_writes_the_references_tokens(golden, golden_lm, where, case):
    model, kind = where.split("/")
    lm, known = golden_lm(model), record(golden, model, kind, case)

    out = play(lm, known)

    for row, ours in enumerate(out.history):
        theirs = known.theirs(row, ours.shape[1], lm.spec.mask_token_id)
        if known.waits:
            assert moved(ours.numpy()).tolist() == moved(theirs).tolist(), f"row {row}"
        else:
            assert ours.tolist() == theirs.tolist(), f"row {row}"
        assert out.sequences[row] == theirs[-1].tolist()
    assert out.nfe == max(out.row_nfe) <= known.facts["forwards"]


def test_every_recorded_case_has_its_test(golden):
    files = [path for path in golden.glob("*/samplers_*.json") if path.parent.name != "common"]
    there = {
        (path.parent.name, path.stem.removeprefix("samplers_"), item["case"])
        for path in files
        for item in json.loads(path.read_text())
    }
    same = {(*where.split("/"), case) for where, cases in CASES.items() for case in cases.split()}
    assert same | APART == there
    assert not same & APART


# --- where ours differs, and why


def test_ties_at_confidence_0_go_to_the_leftmost(golden, golden_lm):
    """A begin-suppressed token has confidence 0 exactly; of several, `torch.topk` takes any."""
    lm, known = golden_lm("llada"), record(golden, "llada", "mdlm", "begin_suppress5_b32_s16")
    commits = {}
    out = play(lm, known)
    for row, ours in enumerate(out.history):
        theirs = known.theirs(row, ours.shape[1], lm.spec.mask_token_id)
        same = agreement(ours.numpy(), theirs)
        assert same == (13, 1)[row]
        commits[row] = out.commits[row][same - 1]
        assert 0.0 in commits[row].confidences  # the first step that differs chooses among equals
        before = theirs[same - 1]
        written = np.flatnonzero((theirs[same] != before) & (ours[same].numpy() == before))
        assert len(written) and set(theirs[same][written]) <= set(known.config.begin_suppress_tokens)
        suppressed = [
            place
            for place, confidence in zip(commits[row].positions, commits[row].confidences, strict=True)
            if confidence == 0
        ]
        assert max(suppressed) < min(set(written) - set(commits[row].positions))
    assert fills_every_mask(lm, known, out)


@pytest.mark.parametrize("model", PROMPT_MASKS)
def test_a_mask_in_the_prompt_stays_where_the_reference_writes_over_it(golden, golden_lm, model):
    lm, known = golden_lm(model), record(golden, model, "mdlm", "prompt_contains_mask")
    [prompt] = known.prompts
    theirs = known.history[:, 0]
    out = play(lm, known)
    place = prompt.index(lm.spec.mask_token_id)
    untouched = int((theirs[:, place] == lm.spec.mask_token_id).sum())  # canvases before it is written over
    assert untouched > 1
    assert agreement(out.history[0].numpy(), theirs) == untouched
    assert fills_every_mask(lm, known, out)


def test_a_short_row_does_not_see_the_filler_beside_it(golden, golden_lm):
    """Fast-dLLM's LLaDA attends to the end-of-text tokens that make rows equally long."""
    lm, known = golden_lm("llada"), record(golden, "llada", "fastdllm", "None_uneq_thr05")
    out = play(lm, known)
    widest = max(range(3), key=lambda row: len(known.prompts[row]))
    for row, ours in enumerate(out.history):
        theirs = known.theirs(row, ours.shape[1], lm.spec.mask_token_id)
        if row == widest:
            assert moved(ours.numpy()).tolist() == moved(theirs).tolist()
        else:
            assert agreement(ours.numpy(), theirs) == 1
    assert out.sequences == as_alone(lm, known)
    # with the filler given as text, and seen, the rows are the reference's
    longest = len(known.prompts[widest])
    for row in set(range(3)) - {widest}:
        prompt, new = known.prompts[row], known.config.max_new_tokens
        filler = [lm.spec.eos_token_id] * (longest - len(prompt))
        assert seen_by_hand(lm, known.config, prompt, filler) == known.facts["final"][row][: len(prompt) + new]


def seen_by_hand(lm: DiffusionLM, config: SamplerConfig, prompt: list[int], filler: list[int]) -> list[int]:
    """The row with filler that is attended to, by the engine: the filler is given text behind the answer."""
    from dllm_ray.sampling.engine import Engine, Row

    new = config.max_new_tokens
    masks = [lm.spec.mask_token_id] * new
    size, steps = config.blocks()
    engine = Engine(lm)
    engine.admit(
        Row(
            tokens=prompt + masks + filler,
            open=[False] * len(prompt) + [True] * new + [False] * len(filler),
            config=config,
            block_start=len(prompt),
            block_size=size,
            steps_per_block=steps,
            seed=0,
            early_stop=False,
        )
    )
    while engine.busy:
        engine.step()
    return engine.take_finished()[0].tokens[: len(prompt) + new]


@pytest.mark.parametrize("case", LEFT_BEHIND)
def test_masks_that_the_reference_leaves_behind_are_filled(golden, golden_lm, case):
    """Its dual loop ends with the quotas of the schedule, which a threshold or a factor doesn't keep to."""
    lm, known = golden_lm("llada"), record(golden, "llada", "fastdllm", case)
    out = play(lm, known)
    assert known.facts["masks_left"] > 0
    steps = known.config.blocks()[1]
    for row, ours in enumerate(out.history):
        theirs = known.theirs(row, ours.shape[1], lm.spec.mask_token_id)
        assert agreement(ours.numpy(), theirs) == steps + 1  # the whole of their first block
        begin = len(known.prompts[row])
        left = slice(begin, begin + known.config.block_size)
        assert (theirs[steps + 1][left] == lm.spec.mask_token_id).any()  # they go on, with masks behind them
        after = slice(begin + known.config.block_size, None)
        assert (ours[steps + 1].numpy()[after] == lm.spec.mask_token_id).all()  # ours finishes the block first
    assert fills_every_mask(lm, known, out)


@pytest.mark.parametrize(("case", "same"), MASKS_WRITTEN.items())
def test_the_mask_token_is_never_written_where_the_reference_writes_it(golden, golden_lm, case, same):
    lm, known = golden_lm("a2d_qwen3"), record(golden, "a2d_qwen3", "bd3lm", case)
    mask = lm.spec.mask_token_id
    out = play(lm, known)
    assert known.facts["masks_left"] > 0
    apart = []
    for row, ours in enumerate(out.history):
        theirs = known.theirs(row, ours.shape[1], mask)
        apart.append(agreement(ours.numpy(), theirs))
        if apart[row] < len(theirs):  # there they spend a step's quota on a mask
            written = [(canvases[apart[row]] != mask).sum() for canvases in (ours.numpy(), theirs)]
            assert written[0] > written[1]
    assert min(apart) == same
    assert fills_every_mask(lm, known, out)


def test_an_emitted_pad_token_is_text_where_the_reference_takes_it_for_padding(golden, golden_lm):
    lm, known = golden_lm("a2d_qwen2"), record(golden, "a2d_qwen2", "bd3lm", "b8_n32_uneq")
    out = play(lm, known)
    for row, ours in enumerate(out.history):
        theirs = known.theirs(row, ours.shape[1], lm.spec.mask_token_id)
        same = agreement(ours.numpy(), theirs)
        if row != 1:
            assert same == len(theirs) == len(ours)
            continue
        assert same == 17  # the first step of the third block
        begin = len(known.prompts[row])
        done = ours[same - 1, begin : begin + 16].tolist()
        assert lm.spec.pad_token_id in done
        assert lm.spec.pad_token_id not in ours[8, begin : begin + 8].tolist()
    assert fills_every_mask(lm, known, out)


@pytest.mark.parametrize(("model", "kind", "case"), REFUSED)
def test_what_the_reference_refuses_is_sampled_row_by_row_alike(golden, golden_lm, model, kind, case):
    """Unequal prompts with a cache, two rows with a dual cache, and the policy origin."""
    lm, known = golden_lm(model), record(golden, model, kind, case)
    assert known.facts["error"]
    known.config = replace(known.config, seed=5)
    out = play(lm, known)
    assert fills_every_mask(lm, known, out)
    assert out.sequences == as_alone(lm, known)
    assert max(out.row_nfe) <= known.config.max_new_tokens
