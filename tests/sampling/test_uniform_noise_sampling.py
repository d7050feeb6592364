"""Sampling without a mask token: the settings, seeds, counts, traces and commits of the sampler around transformers'
own `generate`, on a DiffusionGemma with random weights."""

import dataclasses
import threading

import pytest
import torch
from gemma_testing import make_gemma, save_gemma

from dllm_ray.errors import ConfigError, ModelError
from dllm_ray.models.lm import DiffusionLM
from dllm_ray.models.load import load
from dllm_ray.sampling import SamplerConfig
from dllm_ray.sampling.uniform_noise import canvases, generate, stream

CANVAS = 8
PROMPT = [3, 40, 41, 42, 43]
OTHERS = [[3, 50], [60, 61, 62, 63, 64, 65, 66, 67, 68, 69]]


@pytest.fixture(scope="module")
def lm(tokenizer, tmp_path_factory):
    """A DiffusionGemma of some 50,000 weights that is sure enough of what it says to settle on a canvas."""
    model, folder = make_gemma(context=64), tmp_path_factory.mktemp("gemma")
    source = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() >= 2:
                parameter.normal_(std=parameter.shape[-1] ** -0.5, generator=source)
    save_gemma(model, tokenizer, folder)
    return load(folder)


def settings(**changes) -> SamplerConfig:
    return SamplerConfig(**({"max_new_tokens": 2 * CANVAS, "steps_per_block": 6} | changes))


def ending_with(lm, token: int) -> DiffusionLM:
    """The same model, for which another token is the end of text."""
    return DiffusionLM(lm.model, lm.tokenizer, dataclasses.replace(lm.spec, eos_token_id=token))


@pytest.fixture
def counted(lm):
    """A list that grows by one number with every forward of the decoder: the rows in it."""
    rows = []
    hook = lm.model.model.decoder.register_forward_hook(lambda module, args, output: rows.append(len(output[0])))
    yield rows
    hook.remove()


@pytest.mark.parametrize("new", [5, CANVAS, 20, 32])
def test_tokens_are_those_of_generate_of_transformers(lm, new):
    with torch.random.fork_rng():
        torch.manual_seed(11)
        expected = lm.model.generate(
            torch.tensor([PROMPT]), max_new_tokens=new, max_denoising_steps=6, eos_token_id=1, pad_token_id=0
        ).sequences[0]
    made = generate(lm, settings(max_new_tokens=new), [PROMPT], [11])
    assert made.sequences == [expected[: len(PROMPT) + new].tolist()]
    assert made.completions == [expected[len(PROMPT) : len(PROMPT) + new].tolist()]
    assert made.history is made.commits is None


def test_a_row_gets_the_same_tokens_whatever_its_neighbours_are(lm):
    alone = generate(lm, settings(), [PROMPT], [7])
    among = generate(lm, settings(), [OTHERS[0], PROMPT, OTHERS[1]], [1, 7, 2])
    assert among.sequences[1] == alone.sequences[0]
    assert among.row_nfe[1] == alone.row_nfe[0]
    assert [len(row) for row in among.sequences] == [2 + 16, 5 + 16, 10 + 16]


def test_the_seed_decides(lm):
    first, again, other = generate(lm, settings(), [PROMPT] * 3, [7, 7, 8]).sequences
    assert first == again != other


def test_torchs_own_generator_is_neither_used_nor_moved(lm):
    before = torch.get_rng_state()
    generate(lm, settings(), [PROMPT], [7])
    assert torch.equal(torch.get_rng_state(), before)


def test_forwards_of_the_decoder_are_counted(lm, counted):
    made = generate(lm, settings(), [PROMPT, *OTHERS], [1, 2, 3])
    assert counted == [1] * made.nfe
    assert made.nfe == sum(made.row_nfe)


def test_a_canvas_that_is_settled_takes_no_more_steps(lm, monkeypatch):
    monkeypatch.setattr(lm.model.generation_config, "confidence_threshold", 100.0)
    monkeypatch.setattr(lm.model.generation_config, "stability_threshold", 0)
    assert generate(lm, settings(), [PROMPT], [7]).row_nfe == [2]  # one for each canvas


@pytest.mark.parametrize(
    ("changes", "each"),
    [({"steps_per_block": 3}, 3), ({"steps_per_block": None, "steps": 7}, 4), ({"steps_per_block": None}, 64)],
)
def test_steps_are_divided_over_the_canvases(lm, monkeypatch, changes, each):
    monkeypatch.setattr(lm.model.generation_config, "confidence_threshold", 1e-30)
    assert generate(lm, settings(**changes), [PROMPT], [7]).row_nfe == [2 * each]


def test_fewer_steps_than_canvases_are_refused(lm):
    with pytest.raises(ConfigError, match="steps: 1 steps are fewer than the 2 blocks"):
        generate(lm, settings(steps_per_block=None, steps=1), [PROMPT], [7])


def test_history_and_commits_tell_what_every_step_showed(lm):
    config = settings(max_new_tokens=20)
    prompts = [PROMPT, *OTHERS]
    made = generate(lm, config, prompts, [1, 2, 3], trace=True)
    assert made.sequences == generate(lm, config, prompts, [1, 2, 3]).sequences
    for row, canvas in enumerate(canvases(lm, config, prompts)):
        history, commits = made.history[row], made.commits[row]
        assert history.shape == (made.row_nfe[row] + 1, len(prompts[row]) + 20)
        assert canvas == prompts[row] + [0] * 20 == history[0].tolist()
        assert history[-1].tolist() == made.sequences[row]
        assert [commit.step for commit in commits] == list(range(made.row_nfe[row]))
        assert [commit.done for commit in commits] == [False] * (len(commits) - 1) + [True]
        for commit, before, after in zip(commits, history, history[1:], strict=False):
            assert commit.row == row
            assert commit.positions == (before != after).nonzero().flatten().tolist()
            assert commit.tokens == after[commit.positions].tolist()
            assert len(commit.confidences) == len(commit.tokens)
            assert all(1 / 300 < confidence <= 1 for confidence in commit.confidences)


def test_a_step_shows_the_likeliest_tokens_and_how_likely_they_are(lm):
    seen = []
    hook = lm.model.lm_head.register_forward_hook(lambda module, args, output: seen.append(output[0].clone()))
    commits = generate(lm, settings(max_new_tokens=CANVAS), [PROMPT], [7], trace=True).commits[0]
    hook.remove()
    cap = lm.model.config.text_config.final_logit_softcapping
    for logits, commit in zip(seen, commits, strict=True):
        likeliest = (cap * (logits / cap).tanh()).softmax(dim=1).max(dim=1)
        places = [position - len(PROMPT) for position in commit.positions]
        assert commit.tokens == likeliest.indices[places].tolist()
        torch.testing.assert_close(torch.tensor(commit.confidences), likeliest.values[places], rtol=1e-4, atol=1e-6)


def test_the_stream_is_what_a_trace_holds(lm):
    made = generate(lm, settings(), [PROMPT, *OTHERS], [1, 2, 3], trace=True)
    streamed = list(stream(lm, settings(), [PROMPT, *OTHERS], [1, 2, 3]))
    assert streamed == [commit for commits in made.commits for commit in commits]


def test_streams_don_t_disturb_each_other(lm):
    expected = [list(stream(lm, settings(), [PROMPT], [seed])) for seed in (1, 2)]
    first, second = (stream(lm, settings(), [PROMPT], [seed]) for seed in (1, 2))
    both = list(zip(first, second, strict=False))
    assert [list(commits) for commits in zip(*both, strict=True)] == [part[: len(both)] for part in expected]


def test_a_stream_that_is_closed_stops_the_model(lm, counted):
    threads = threading.active_count()
    commits = stream(lm, settings(max_new_tokens=40, steps_per_block=500), [PROMPT], [7])
    next(commits)
    commits.close()
    done = len(counted)
    assert threading.active_count() == threads
    assert done == len(counted) < 2500


def test_the_streams_reader_gets_the_models_error(lm):
    hook = lm.model.lm_head.register_forward_hook(lambda module, args, output: output * torch.nan)
    with pytest.raises(ModelError, match="NaN"):
        list(stream(lm, settings(), [PROMPT], [7]))
    with pytest.raises(ModelError, match="NaN"):
        generate(lm, settings(), [PROMPT], [7])
    hook.remove()


def test_an_answer_ends_before_the_first_stop_token(lm):
    whole = generate(lm, settings(), [PROMPT], [7]).completions[0]
    stop = whole[3]
    made = generate(ending_with(lm, stop), settings(), [PROMPT], [7], trace=True)
    end = whole.index(stop)
    assert made.completions == [whole[:end]]
    assert made.sequences == [PROMPT + whole[: end + 1] + [0] * (15 - end)]
    assert made.row_nfe[0] <= 6  # the second canvas is never begun
    assert made.history[0][-1].tolist() == made.sequences[0]
    assert made.commits[0][-1].done


def test_the_end_of_a_turn_ends_an_answer_too(lm):
    whole = generate(lm, settings(), [PROMPT], [7]).completions[0]
    turns = DiffusionLM(lm.model, None, dataclasses.replace(lm.spec, eot_token_id=whole[3]))
    assert generate(turns, settings(), [PROMPT], [7]).completions == [whole[: whole.index(whole[3])]]


def test_without_early_stop_the_text_is_the_same_and_the_rest_is_kept(lm):
    whole = generate(lm, settings(), [PROMPT], [7])
    stopping = ending_with(lm, whole.completions[0][3])
    made = generate(stopping, settings(eos_early_stop=False), [PROMPT], [7])
    assert made.sequences == whole.sequences
    assert made.row_nfe == whole.row_nfe
    assert made.completions == generate(stopping, settings(), [PROMPT], [7]).completions


def test_suppressed_tokens_are_never_written(lm):
    config = settings(max_new_tokens=CANVAS)
    usual = set(generate(lm, config, [PROMPT], [7]).completions[0])
    made = generate(lm, dataclasses.replace(config, suppress_tokens=tuple(usual)), [PROMPT], [7], trace=True)
    assert not usual & set(made.history[0][:, len(PROMPT) :].flatten().tolist())


def test_an_eos_penalty_keeps_answers_from_ending(lm):
    likeliest = generate(lm, settings(), [PROMPT], [7]).completions[0][3]
    stopping = ending_with(lm, likeliest)
    assert likeliest not in generate(stopping, settings(eos_penalty=1e4), [PROMPT], [7]).sequences[0]
    assert generate(stopping, settings(eos_penalty=1e-30), [PROMPT], [7]).completions == (
        generate(stopping, settings(), [PROMPT], [7]).completions
    )


def test_a_temperature_stays_the_same_in_all_steps_and_0_keeps_the_models_own(lm, monkeypatch):
    from transformers.models.diffusion_gemma import generation_diffusion_gemma as generation

    divided_by = []
    straight_line = generation.LinearTemperatureScheduleLogitsProcessor.__call__

    def spy(self, input_ids, scores, cur_step):
        divided_by.append(float(torch.ones(()) / straight_line(self, input_ids, torch.ones(()), cur_step)))
        return straight_line(self, input_ids, scores, cur_step)

    monkeypatch.setattr(generation.LinearTemperatureScheduleLogitsProcessor, "__call__", spy)
    monkeypatch.setattr(lm.model.generation_config, "confidence_threshold", 1e-30)
    config = settings(max_new_tokens=CANVAS, steps_per_block=4)
    generate(lm, dataclasses.replace(config, temperature=0.3), [PROMPT], [7])
    assert divided_by == pytest.approx([0.3] * 4, rel=1e-6)
    divided_by.clear()
    generate(lm, config, [PROMPT], [7])
    assert divided_by == pytest.approx([0.8, 0.7, 0.6, 0.5])
    divided_by.clear()
    monkeypatch.setattr(lm.model.generation_config, "t_max", 1.2)
    generate(lm, config, [PROMPT], [7])
    assert divided_by == pytest.approx([1.2, 1.0, 0.8, 0.6])


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("policy", "random"),
        ("schedule", "cosine"),
        ("cfg_scale", 1.5),
        ("cfg_keep_tokens", (5,)),
        ("begin_suppress_tokens", (5,)),
        ("threshold", 0.9),
        ("cache", "prefix"),
        ("top_p", 0.9),
        ("shift_logits", True),
        ("block_size", 4),
    ],
)
def test_settings_without_a_meaning_are_refused_by_name(lm, name, value):
    with pytest.raises(ConfigError, match="has no meaning for diffusion_gemma") as error:
        generate(lm, settings(**{name: value}), [PROMPT], [7])
    assert error.value.field == name
    with pytest.raises(ConfigError, match=f"^{name}: "):
        next(stream(lm, settings(**{name: value}), [PROMPT], [7]))


@pytest.mark.parametrize("changes", [{"block_size": None}, {"block_size": CANVAS}, {"shift_logits": False}])
def test_settings_that_say_what_the_model_does_anyway_are_taken(lm, changes):
    usual = generate(lm, settings(), [PROMPT], [7]).sequences
    assert generate(lm, settings(**changes), [PROMPT], [7]).sequences == usual


def test_max_length_leaves_room_beside_the_longest_prompt(lm):
    config = settings(max_new_tokens=None, max_length=22)
    assert [len(row) for row in generate(lm, config, [PROMPT, *OTHERS], [1, 2, 3]).sequences] == [17, 14, 22]
    with pytest.raises(ConfigError, match="max_length: 10 leaves no room beside a prompt of 10"):
        generate(lm, settings(max_new_tokens=None, max_length=10), OTHERS, [1, 2])


def test_what_doesnt_fit_the_model_is_refused(lm):
    with pytest.raises(ConfigError, match=r"prompt of 5 tokens and the 8 canvases of 8 .* context of 64"):
        generate(lm, settings(max_new_tokens=59), [PROMPT], [7])
    with pytest.raises(ConfigError, match="token 300 is outside the model's vocabulary of 300"):
        generate(lm, settings(), [[3, 300]], [7])
    with pytest.raises(ConfigError, match="token 301 is outside"):
        generate(lm, settings(suppress_tokens=(301,)), [PROMPT], [7])


def test_an_empty_prompt_becomes_the_beginning_of_text(lm):
    assert generate(lm, settings(), [[]], [7]).sequences == generate(lm, settings(), [[3]], [7]).sequences


def test_no_prompts_make_nothing(lm):
    made = generate(lm, settings(), [], [], trace=True)
    assert (made.sequences, made.completions, made.row_nfe, made.nfe) == ([], [], [], 0)
    assert list(stream(lm, settings(), [], [])) == []
