"""The sampler against a slow, obvious denoiser, and what its settings and figures promise."""

import copy
import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dllm_ray.errors import ConfigError, ModelError
from dllm_ray.models.lm import DiffusionLM
from dllm_ray.sampling import Sampler, SamplerConfig
from dllm_ray.sampling.noise import ORDER, TOKEN, uniform
from dllm_ray.sampling.unmasking import commit_schedule

PROMPTS = [[40, 41, 42, 43, 44], [50, 51], [60, 61, 62, 63, 64, 65, 66, 67]]
SEEDS = [11, 22, 33]


def denoise(lm: DiffusionLM, prompt: list[int], config: SamplerConfig, seed: int = 0) -> list[list[int]]:
    """One row alone: every canvas from the first to the last. No batch, no early stop, logits at all positions."""
    mask, total, step = lm.spec.mask_token_id, len(prompt) + config.max_new_tokens, 0
    canvas = prompt + [mask] * config.max_new_tokens
    history = [list(canvas)]
    blocks = -(-config.max_new_tokens // config.block_size)
    steps = config.steps_per_block or -(-config.steps // blocks)
    for start in range(len(prompt), total, config.block_size):
        stop = min(start + config.block_size, total)
        for quota in commit_schedule(stop - start, steps, config.schedule):
            logits = all_logits(lm, canvas, config)
            if config.cfg_scale:
                blind = [mask if token not in config.cfg_keep_tokens else token for token in prompt]
                unguided = all_logits(lm, blind + canvas[len(prompt) :], config)
                logits = unguided + (config.cfg_scale + 1) * (logits - unguided)
            offers = []
            for place in (place for place in range(start, stop) if canvas[place] == mask):
                scores = logits[place].double()
                scores[list(config.suppress_tokens)] = -torch.inf
                textual = scores.clone()
                textual[mask] = -torch.inf
                token = draw(textual, config.temperature, seed, step, place)
                scores[list(config.begin_suppress_tokens)] = -torch.inf
                sure = scores.softmax(0)[token].item()
                offers.append((number(seed, step, place, ORDER) if config.policy == "random" else sure, place, token))
            offers.sort(key=lambda offer: -offer[0])  # stable: of equally sure ones the leftmost first
            for _, place, token in offers[:quota]:
                canvas[place] = token
            history.append(list(canvas))
            step += 1
    return history


@torch.no_grad()
def all_logits(lm: DiffusionLM, canvas: list[int], config: SamplerConfig) -> torch.Tensor:
    logits = lm.model(input_ids=torch.tensor([canvas])).logits[0]
    return torch.cat([logits[:1], logits[:-1]]) if config.shift_logits else logits


def number(seed: int, step: int, place: int, stream: int) -> float:
    return uniform(torch.tensor(seed), torch.tensor(step), torch.tensor(place), stream).item()


def draw(scores: torch.Tensor, temperature: float, seed: int, step: int, place: int) -> int:
    if temperature == 0:
        return int(scores.argmax())
    below, target = 0.0, number(seed, step, place, TOKEN)
    for token, share in enumerate((scores / temperature).softmax(0).tolist()):
        below += share
        if target < below:
            return token
    raise AssertionError("the shares of all tokens add up to 1")


def check_against_denoiser(lm: DiffusionLM, config: SamplerConfig, prompts=PROMPTS, seeds=SEEDS) -> list[list[int]]:
    config = dataclasses.replace(config, eos_early_stop=False)
    out = Sampler(lm, config).sample(prompts, trace=True, seeds=seeds)
    for row, (prompt, seed) in enumerate(zip(prompts, seeds, strict=True)):
        assert out.history[row].tolist() == denoise(lm, prompt, config, seed), f"row {row}"
    return out.sequences


def ending(lm: DiffusionLM, token: int) -> DiffusionLM:
    """The same model, with another token as the end of a text."""
    return DiffusionLM(lm.model, None, dataclasses.replace(lm.spec, eos_token_id=token, eot_token_id=None))


def in_double(lm: DiffusionLM) -> DiffusionLM:
    """The same model in float64: two proposals may be as sure as each other to float32's precision, and then batched
    forwards and single ones rank them differently."""
    lm = copy.deepcopy(lm)
    lm.model.double()
    return lm


ARCHITECTURES = pytest.mark.parametrize("architecture", ["bert", "llama"])

# --- the algorithm


@ARCHITECTURES
@given(
    model=st.integers(0, 3),
    new=st.integers(1, 14),
    block=st.integers(1, 14),
    steps=st.integers(14, 30),
    per_block=st.none() | st.integers(1, 6),
    schedule=st.sampled_from(["linear", "cosine"]),
)
@settings(max_examples=15)
def test_greedy_rows_are_what_the_slow_denoiser_writes(
    sharp_lm, architecture, model, new, block, steps, per_block, schedule
):
    config = SamplerConfig(
        max_new_tokens=new, block_size=min(block, new), steps=steps, steps_per_block=per_block, schedule=schedule
    )
    check_against_denoiser(in_double(sharp_lm(architecture, seed=model)), config)


SHORT = SamplerConfig(max_new_tokens=12, block_size=6, steps=8)
VARIANTS = pytest.mark.parametrize(
    "change",
    [
        {"temperature": 0.8},
        {"policy": "random"},
        {"temperature": 1.5, "policy": "random"},
        {"cfg_scale": 0.7},
        {"cfg_scale": 2.0, "cfg_keep_tokens": (41, 61, 62)},
        {"shift_logits": True},
        {"shift_logits": True, "cfg_scale": 1.0, "temperature": 1.0, "schedule": "cosine"},
        {"suppress_tokens": tuple(range(10, 120))},
        {"begin_suppress_tokens": tuple(range(10, 150))},
        {"suppress_tokens": tuple(range(10, 120)), "begin_suppress_tokens": (150, 151), "cfg_scale": 0.5},
    ],
    ids="-".join,
)


@ARCHITECTURES
@VARIANTS
def test_every_setting_is_what_the_slow_denoiser_does(sharp_lm, architecture, change):
    lm = sharp_lm(architecture)
    changed = check_against_denoiser(lm, dataclasses.replace(SHORT, **change))
    assert changed != check_against_denoiser(lm, SHORT)  # the setting matters on these rows


def test_the_spec_says_whether_logits_are_shifted(sharp_lm):
    lm = sharp_lm("llama")
    shifted = DiffusionLM(lm.model, None, dataclasses.replace(lm.spec, shift_logits=True))
    told = Sampler(lm, dataclasses.replace(SHORT, shift_logits=True)).sample(PROMPTS)
    assert Sampler(shifted, SHORT).sample(PROMPTS).sequences == told.sequences
    unshifted = Sampler(shifted, dataclasses.replace(SHORT, shift_logits=False)).sample(PROMPTS)
    assert unshifted.sequences == Sampler(lm, SHORT).sample(PROMPTS).sequences


def test_one_block_where_no_size_is_given(sharp_lm):
    config = dataclasses.replace(SHORT, block_size=None)
    whole = dataclasses.replace(SHORT, block_size=12)
    lm = sharp_lm()
    assert Sampler(lm, config).sample(PROMPTS).sequences == Sampler(lm, whole).sample(PROMPTS).sequences


@ARCHITECTURES
def test_infilling_a_tail_of_masks_is_sampling(sharp_lm, architecture):
    lm, prompt = sharp_lm(architecture), PROMPTS[2]
    config = SamplerConfig(max_new_tokens=8, block_size=8, steps=16, steps_per_block=5, eos_early_stop=False)
    sampled = Sampler(lm, config).sample([prompt], trace=True)
    filled = Sampler(lm, config).infill([prompt + [lm.spec.mask_token_id] * 8], trace=True)
    assert filled.history[0].tolist() == sampled.history[0].tolist()
    assert filled.completions == [sampled.sequences[0][8:]]


# --- randomness belongs to the row


@ARCHITECTURES
@pytest.mark.parametrize("change", [{"temperature": 1.0}, {"policy": "random", "temperature": 0.7}], ids=str)
def test_a_seeded_row_is_the_same_alone_in_any_batch_and_in_any_order(sharp_lm, architecture, change):
    lm, config = sharp_lm(architecture), dataclasses.replace(SHORT, **change)
    alone = [
        Sampler(lm, config).sample([prompt], seeds=[seed]).sequences[0]
        for prompt, seed in zip(PROMPTS, SEEDS, strict=True)
    ]
    for max_rows in (None, 1, 2, 3):
        for order in ([0, 1, 2], [2, 0, 1], [1, 2]):
            out = Sampler(lm, config, max_rows).sample([PROMPTS[i] for i in order], seeds=[SEEDS[i] for i in order])
            assert out.sequences == [alone[i] for i in order], (max_rows, order)


def test_the_seed_decides_and_rows_of_a_call_differ(sharp_lm):
    prompts = [PROMPTS[0]] * 3

    def texts(seed):
        config = dataclasses.replace(SHORT, temperature=1.0, seed=seed)
        return Sampler(sharp_lm(), config).sample(prompts).sequences

    assert texts(1) == texts(1)
    assert texts(1) != texts(2)
    assert texts(None) != texts(None)
    assert len({tuple(text) for text in texts(1)}) == 3


def test_a_greedy_row_needs_no_seed(sharp_lm):
    assert Sampler(sharp_lm(), SHORT).sample(PROMPTS).sequences == Sampler(sharp_lm(), SHORT).sample(PROMPTS).sequences


# --- which tokens may be written


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_suppressed_tokens_never_appear(sharp_lm, temperature):
    config = SamplerConfig(max_new_tokens=24, block_size=8, steps=24, temperature=temperature, seed=0)
    unwanted = set()
    for _ in range(3):  # whatever takes their place is suppressed next
        config = dataclasses.replace(config, suppress_tokens=tuple(unwanted), eos_early_stop=False)
        out = Sampler(sharp_lm(), config).sample([PROMPTS[0]])
        written = set(out.sequences[0][len(PROMPTS[0]) :])
        assert written
        assert not written & unwanted
        unwanted |= written


def test_begin_suppressed_tokens_are_committed_last_in_their_block(sharp_lm):
    lm = blind(sharp_lm())
    config = SamplerConfig(max_new_tokens=24, block_size=8, steps=24, eos_early_stop=False)
    plain = Sampler(lm, config).sample([PROMPTS[0]]).sequences
    late = set(plain[0][len(PROMPTS[0]) :][::3])
    held = dataclasses.replace(config, begin_suppress_tokens=tuple(late))
    events = list(Sampler(lm, held).stream([PROMPTS[0]]))

    order = [event.tokens[0] in late for event in events]
    blocks = [order[start : start + 8] for start in (0, 8, 16)]
    assert all(block == sorted(block) for block in blocks)
    assert any(True in block and False in block for block in blocks)
    assert all((event.confidences[0] == 0) == is_late for event, is_late in zip(events, order, strict=True))
    assert Sampler(lm, held).sample([PROMPTS[0]]).sequences == plain  # later, but the same


def blind(lm: DiffusionLM) -> DiffusionLM:
    """The same model without attention: what it proposes for a position never changes."""
    model = copy.deepcopy(lm.model)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "attention.output.dense" in name:
                parameter.zero_()
    return DiffusionLM(model, None, lm.spec)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_the_mask_token_is_never_written_however_much_the_model_likes_it(make_lm, temperature):
    lm = make_lm("bert")
    with torch.no_grad():
        lm.model.get_output_embeddings().bias[lm.spec.mask_token_id] = 1000.0
    config = dataclasses.replace(SHORT, temperature=temperature, eos_early_stop=False)
    prompts = [[40, lm.spec.mask_token_id, 41], [50]]
    out = Sampler(lm, config).sample(prompts)
    for prompt, sequence in zip(prompts, out.sequences, strict=True):
        assert sequence[: len(prompt)] == prompt  # a mask in the prompt is text
        assert len(sequence) == len(prompt) + 12
        assert lm.spec.mask_token_id not in sequence[len(prompt) :]


# --- the end of a text


@ARCHITECTURES
@pytest.mark.parametrize("change", [{}, {"temperature": 1.0, "seed": 4}], ids=str)
def test_early_stop_gives_the_same_texts_with_fewer_forwards(sharp_lm, architecture, change):
    config = SamplerConfig(max_new_tokens=24, block_size=6, steps=24, eos_early_stop=False, **change)
    written = Sampler(sharp_lm(architecture), config).sample(PROMPTS).sequences
    lm = ending(sharp_lm(architecture), token=written[0][len(PROMPTS[0]) + 8])  # some row ends in its second block

    full = Sampler(lm, config).sample(PROMPTS)
    stopped = Sampler(lm, dataclasses.replace(config, eos_early_stop=True)).sample(PROMPTS)

    assert stopped.completions == full.completions
    assert stopped.row_nfe[0] < full.row_nfe[0] == 24
    assert sum(stopped.row_nfe) < sum(full.row_nfe)
    for row, completion in enumerate(full.completions):
        start = len(PROMPTS[row])
        assert completion == full.sequences[row][start : start + len(completion)]
        assert lm.spec.eos_token_id not in completion
        assert len(stopped.sequences[row]) == start + 24
        assert lm.spec.mask_token_id not in stopped.sequences[row]


def test_an_end_of_turn_ends_a_completion_too(sharp_lm):
    config = dataclasses.replace(SHORT, eos_early_stop=False)
    written = Sampler(sharp_lm(), config).sample([PROMPTS[0]]).sequences[0][5:]
    end = written[7]
    spec = dataclasses.replace(sharp_lm().spec, eos_token_id=299, eot_token_id=end)
    out = Sampler(DiffusionLM(sharp_lm().model, None, spec), config).sample([PROMPTS[0]])
    assert out.completions == [written[: written.index(end)]]


def test_an_end_of_text_in_the_prompt_ends_nothing(sharp_lm):
    out = Sampler(ending(sharp_lm(), token=PROMPTS[0][1]), SHORT).sample([PROMPTS[0]])
    assert out.row_nfe == [8]


def test_infilling_writes_every_mask_whatever_comes_before_it(sharp_lm):
    lm = sharp_lm()
    mask, eos = lm.spec.mask_token_id, lm.spec.eos_token_id
    rows = [[40, mask, eos, mask, mask, 41], [mask] * 3, [50, 51]]
    out = Sampler(lm, SamplerConfig(steps=4, block_size=3)).infill(rows, trace=True)
    for row, sequence, completion in zip(rows, out.sequences, out.completions, strict=True):
        assert [old for old in row if old != mask] == [
            new for old, new in zip(row, sequence, strict=True) if old != mask
        ]
        assert completion == [new for old, new in zip(row, sequence, strict=True) if old == mask]
        assert mask not in sequence
    assert out.row_nfe[2] == 0
    assert out.history[2].tolist() == [[50, 51]]


def test_infilling_goes_on_behind_an_end_of_text_that_it_wrote(sharp_lm):
    rows = [[40, *[sharp_lm().spec.mask_token_id] * 3, 41, *[sharp_lm().spec.mask_token_id] * 6]]
    config = SamplerConfig(steps=12, block_size=4)
    plain = Sampler(sharp_lm(), config).infill(rows)
    ended = Sampler(ending(sharp_lm(), token=plain.sequences[0][1]), config).infill(rows)
    assert (ended.sequences, ended.completions) == (plain.sequences, plain.completions)


# --- streaming and figures


@ARCHITECTURES
@pytest.mark.parametrize("max_rows", [None, 1, 2])
def test_streamed_events_rebuild_what_sample_returns(sharp_lm, architecture, max_rows):
    config = SamplerConfig(max_new_tokens=18, block_size=6, steps=9, temperature=0.5, seed=3)
    written = Sampler(sharp_lm(architecture), config).sample(PROMPTS).sequences
    lm = ending(sharp_lm(architecture), token=written[1][len(PROMPTS[1]) + 7])
    expected = Sampler(lm, config).sample(PROMPTS)
    assert any(nfe < 9 for nfe in expected.row_nfe)

    canvases = [prompt + [lm.spec.mask_token_id] * 18 for prompt in PROMPTS]
    steps, done = [0, 0, 0], [False, False, False]
    for event in Sampler(lm, config, max_rows).stream(PROMPTS):
        assert not done[event.row]
        assert event.step == steps[event.row]
        assert event.positions == sorted(event.positions)
        for position, token in zip(event.positions, event.tokens, strict=True):
            assert canvases[event.row][position] == lm.spec.mask_token_id
            canvases[event.row][position] = token
        steps[event.row] += 1
        done[event.row] = event.done

    assert done == [True, True, True]
    assert steps == expected.row_nfe
    filled = [
        [lm.spec.eos_token_id if token == lm.spec.mask_token_id else token for token in canvas] for canvas in canvases
    ]
    assert filled == expected.sequences


def test_events_carry_the_models_probabilities(sharp_lm):
    lm, prompt = sharp_lm(), PROMPTS[0]
    canvas = prompt + [lm.spec.mask_token_id] * 12
    for event in Sampler(lm, dataclasses.replace(SHORT, temperature=1.0, seed=0)).stream([prompt]):
        shares = all_logits(lm, canvas, SHORT).softmax(-1)
        expected = [shares[place, token].item() for place, token in zip(event.positions, event.tokens, strict=True)]
        assert event.confidences == pytest.approx(expected, rel=1e-3)
        for place, token in zip(event.positions, event.tokens, strict=True):
            canvas[place] = token


def test_figures_count_forwards_and_tokens_before_the_end_of_text(sharp_lm):
    config = SamplerConfig(max_new_tokens=12, block_size=6, steps=6, eos_early_stop=False)
    written = Sampler(sharp_lm(), config).sample(PROMPTS).sequences
    lm = ending(sharp_lm(), token=written[0][len(PROMPTS[0]) + 4])
    together, apart = (Sampler(lm, config, max_rows).sample(PROMPTS) for max_rows in (None, 1))

    assert (together.nfe, apart.nfe) == (6, 18)
    assert together.row_nfe == apart.row_nfe == [6, 6, 6]
    tokens = sum(map(len, together.completions))
    assert 0 < tokens < 36
    assert together.tpf == apart.tpf == tokens / 18
    assert together.figures() == {"nfe": 18.0, "tpf": tokens / 18, "tokens_per_s": tokens / together.seconds}


def test_no_prompts_give_no_rows(sharp_lm):
    out = Sampler(sharp_lm(), SHORT).sample([], trace=True)
    assert (out.sequences, out.completions, out.history, out.nfe, out.tpf) == ([], [], [], 0, 0)


def test_history_is_kept_on_request_only(sharp_lm):
    assert Sampler(sharp_lm(), SHORT).sample(PROMPTS).history is None


# --- lengths, and what can't be done


def test_max_length_counts_the_longest_prompt_of_the_call(sharp_lm):
    config = SamplerConfig(max_new_tokens=None, max_length=20, block_size=6, steps=8, eos_early_stop=False)
    out = Sampler(sharp_lm(), config).sample(PROMPTS)
    assert [len(sequence) - len(prompt) for sequence, prompt in zip(out.sequences, PROMPTS, strict=True)] == [12] * 3
    assert out.sequences == Sampler(sharp_lm(), SHORT).sample(PROMPTS).sequences


def test_max_length_without_room_for_an_answer_is_refused(sharp_lm):
    with pytest.raises(ConfigError, match="8 leaves no room beside a prompt of 8"):
        Sampler(sharp_lm(), SamplerConfig(max_new_tokens=None, max_length=8)).sample(PROMPTS)


@pytest.mark.parametrize("method", ["sample", "infill"])
def test_a_canvas_beyond_the_context_is_refused(sharp_lm, method):
    lm = sharp_lm()
    mask = [lm.spec.mask_token_id] * 12
    fits, over = [7] * (lm.max_length - 12), [7] * (lm.max_length - 11)
    fill = (lambda prompt: prompt) if method == "sample" else (lambda prompt: prompt + mask)
    run = getattr(Sampler(lm, dataclasses.replace(SHORT, steps=64)), method)
    assert len(run([fill(fits)]).sequences[0]) == lm.max_length
    with pytest.raises(ConfigError, match=f"{lm.max_length + 1} tokens .* context of {lm.max_length}"):
        run([fill(PROMPTS[0]), fill(over)])


def test_fewer_steps_than_blocks_are_refused(sharp_lm):
    config = SamplerConfig(max_new_tokens=12, block_size=3, steps=3)
    with pytest.raises(ConfigError, match="steps: 3 steps are fewer than the 4 blocks"):
        Sampler(sharp_lm(), config).sample(PROMPTS)
    with pytest.raises(ConfigError, match="steps: 3 steps are fewer than the 4 blocks"):
        Sampler(sharp_lm(), config).infill([[sharp_lm().spec.mask_token_id] * 12])
    for enough in ({"steps": 4}, {"steps_per_block": 1}):
        config = dataclasses.replace(config, eos_early_stop=False, **enough)
        assert Sampler(sharp_lm(), config).sample(PROMPTS).nfe == 4


def test_a_seed_for_each_row_or_none(sharp_lm):
    with pytest.raises(ConfigError, match="2 seeds for 3 rows"):
        Sampler(sharp_lm(), SHORT).sample(PROMPTS, seeds=[1, 2])


def test_an_empty_prompt_is_a_canvas_of_masks(sharp_lm):
    config = dataclasses.replace(SHORT, eos_early_stop=False)
    out = Sampler(sharp_lm(), config).sample([[], PROMPTS[0]], trace=True)
    assert out.history[0].tolist() == denoise(sharp_lm(), [], config)
    assert out.sequences[1] == Sampler(sharp_lm(), config).sample([PROMPTS[0]]).sequences[0]


@pytest.mark.parametrize("bos", [None, 7])
def test_an_empty_prompt_gets_a_left_neighbour_where_logits_are_shifted(sharp_lm, bos):
    lm = sharp_lm("llama")
    spec = dataclasses.replace(lm.spec, shift_logits=True, bos_token_id=bos)
    lm = DiffusionLM(lm.model, None, spec)
    first = spec.eos_token_id if bos is None else bos
    out = Sampler(lm, SHORT).sample([[]])
    assert out.sequences == Sampler(lm, SHORT).sample([[first]]).sequences
    assert out.sequences[0][0] == first


@pytest.mark.parametrize("prompts", [["hello"], [1, 2, 3], [[50.5]], [[[1]]]], ids=str)
def test_prompts_that_are_no_lists_of_token_ids_are_refused(sharp_lm, prompts):
    for method in ("sample", "infill"):
        with pytest.raises(ConfigError, match="token ids"):
            getattr(Sampler(sharp_lm(), SHORT), method)(prompts)


def test_a_seed_beyond_64_bits_is_refused(sharp_lm):
    with pytest.raises(ConfigError, match="64 bits"):
        Sampler(sharp_lm(), SHORT).sample([[40]], seeds=[2**64])


def test_settings_that_leave_no_token_are_refused_before_others_are_disturbed(sharp_lm):
    lm = sharp_lm()
    vocabulary = lm.model.get_input_embeddings().num_embeddings
    everything = set(range(vocabulary)) - {lm.spec.mask_token_id}
    with pytest.raises(ConfigError, match="leaves no token to write with"):
        Sampler(lm, dataclasses.replace(SHORT, suppress_tokens=tuple(everything))).sample([[40]])
    one = dataclasses.replace(SHORT, suppress_tokens=tuple(everything - {77}))
    assert set(Sampler(lm, one).sample([[40]]).completions[0]) == {77}


def test_a_model_without_a_mask_token_is_named(make_lm):
    lm = make_lm("llama")
    plain = DiffusionLM(lm.model, None, dataclasses.replace(lm.spec, mask_token_id=None))
    for call in (Sampler(plain, SHORT).sample, Sampler(plain, SHORT).infill, Sampler(plain, SHORT).canvases):
        with pytest.raises(ModelError, match="has no mask token"):
            call([[40]])


def test_settings_of_a_models_own_that_nobody_knows_are_named(make_lm):
    lm = make_lm()
    with pytest.raises(ModelError, match="'step'"):
        Sampler(DiffusionLM(lm.model, None, dataclasses.replace(lm.spec, sampler={"step": 4})))


def test_a_row_with_nothing_to_fill_is_done_in_a_stream_too(sharp_lm):
    lm = sharp_lm()
    events = list(Sampler(lm, SHORT).stream([[40, 41], [42, lm.spec.mask_token_id]], infill=True))
    assert [(event.row, event.positions, event.done) for event in events] == [(0, [], True), (1, [1], True)]


@pytest.mark.parametrize("architecture", ["llama", "qwen3", "modernbert"])
@pytest.mark.parametrize("cache", ["none", "dual", "block"])
def test_a_row_that_says_the_same_everywhere_doesnt_hang_on_rounding(make_lm, architecture, cache):
    """Of masks alone a model with rotary positions can't tell one from another; rounding could, in a batch."""
    lm = make_lm(architecture)
    config = SamplerConfig(max_new_tokens=12, steps=12, block_size=6, cache=cache, eos_early_stop=False)
    alone = Sampler(lm, config).sample([[]], trace=True)
    among = Sampler(lm, config).sample([[], [50, 51, 52], [60]], trace=True)
    assert alone.history[0].tolist() == among.history[0].tolist()


def test_a_nucleus_of_everything_is_none(sharp_lm):
    warm = dataclasses.replace(SHORT, temperature=1.0, seed=5)
    plain = Sampler(sharp_lm(), warm).sample(PROMPTS)
    assert Sampler(sharp_lm(), dataclasses.replace(warm, top_p=1.0)).sample(PROMPTS).sequences == plain.sequences


@pytest.mark.parametrize("infill", [False, True])
def test_commits_are_told_as_they_happen(sharp_lm, infill):
    lm = sharp_lm()
    mask = lm.spec.mask_token_id
    prompts = [[40, mask, 41, mask], [50, 51, mask]] if infill else PROMPTS
    method = Sampler(lm, SHORT).infill if infill else Sampler(lm, SHORT).sample
    told = []
    out = method(prompts, trace=True, on_commit=told.append)
    assert told == list(Sampler(lm, SHORT).stream(prompts, infill=infill))
    assert [[commit for commit in told if commit.row == row] for row in range(len(prompts))] == out.commits
    assert method(prompts, on_commit=told.append).commits is None
