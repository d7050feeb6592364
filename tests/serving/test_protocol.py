"""Bodies of requests: read as calls, or refused in words that name the field."""

import json
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st
from serving_testing import FACTS

from dllm_ray.sampling.config import SamplerConfig
from dllm_ray.serving import protocol
from dllm_ray.serving.errors import ApiError

HELLO = [{"role": "user", "content": "Hello"}]


def chat(body: dict | bytes, facts=FACTS) -> protocol.Asked:
    body = body if isinstance(body, bytes) else json.dumps({"messages": HELLO} | body).encode()
    return protocol.chat_calls(protocol.read_chat(body), facts, "id", "me", 60.0)


def complete(body: dict, facts=FACTS) -> protocol.Asked:
    request = protocol.read_completion(json.dumps({"prompt": "Once"} | body).encode())
    return protocol.completion_calls(request, facts, "id", "me", 60.0, max_prompts=3)


def refused(ask, body) -> ApiError:
    with pytest.raises(ApiError) as caught:
        ask(body)
    return caught.value


class TestChat:
    def test_a_request_with_everything_is_a_call_with_everything(self):
        asked = chat(
            {
                "max_tokens": 20,
                "temperature": 0.5,
                "top_p": 0.9,
                "n": 3,
                "stop": ["a", "b"],
                "seed": 2**63 - 1,
                "stream": True,
                "stream_options": {"include_usage": True},
                "logprobs": True,
                "diffusion": {"steps": 4, "threshold": None, "stream_canvas": True, "timeout_s": 5},
            }
        )
        (call,) = asked.calls
        assert (call.id, call.client, call.messages, call.prompt) == (
            "id",
            "me",
            ({"role": "user", "content": "Hello"},),
            None,
        )
        assert (call.max_tokens, call.n, call.stop, call.seed) == (20, 3, ("a", "b"), 2**63 - 1)
        assert call.sampler == {"steps": 4, "threshold": None, "temperature": 0.5, "top_p": 0.9}
        assert call.stream and call.canvas and asked.stream and asked.include_usage and asked.logprobs
        assert 4 < call.deadline - time.time() <= 5

    def test_what_is_not_given_is_left_to_the_model(self):
        (call,) = chat({}).calls
        assert (call.sampler, call.seed, call.max_tokens, call.n, call.stop, call.stream) == (
            {},
            None,
            None,
            1,
            (),
            False,
        )
        assert 59 < call.deadline - time.time() <= 60

    def test_the_server_knows_how_long_a_request_may_take(self):
        (call,) = chat({"diffusion": {"timeout_s": 1e6}}).calls
        assert call.deadline - time.time() <= 60

    def test_contents_in_parts_are_joined_and_developers_are_the_system(self):
        parts = [{"type": "text", "text": "Hel"}, {"type": "text", "text": "lo"}]
        (call,) = chat(
            {"messages": [{"role": "developer", "content": "Be kind"}, {"role": "user", "content": parts}]}
        ).calls
        assert call.messages == ({"role": "system", "content": "Be kind"}, {"role": "user", "content": "Hello"})

    def test_the_message_of_an_answer_can_be_given_back(self):
        said = {
            "role": "assistant",
            "content": "Hi",
            "refusal": None,
            "annotations": [],
            "tool_calls": None,
            "audio": None,
        }
        (call,) = chat({"messages": [*HELLO, said, *HELLO]}).calls
        assert call.messages[1] == {"role": "assistant", "content": "Hi"}

    def test_the_newer_name_of_max_tokens_counts_as_well(self):
        assert chat({"max_completion_tokens": 9}).calls[0].max_tokens == 9
        assert chat({"max_completion_tokens": 9, "max_tokens": 9}).calls[0].max_tokens == 9
        assert refused(chat, {"max_completion_tokens": 9, "max_tokens": 8}).param == "max_completion_tokens"

    def test_what_does_not_change_the_answer_is_ignored(self):
        harmless = {
            "user": "u",
            "metadata": {"a": "b"},
            "store": True,
            "service_tier": "auto",
            "parallel_tool_calls": True,
            "presence_penalty": 0,
            "frequency_penalty": 0.0,
            "logit_bias": {},
            "tools": [],
            "tool_choice": "auto",
            "response_format": {"type": "text"},
            "modalities": ["text"],
            "top_logprobs": 0,
            "stop": None,
            "n": None,
        }
        assert chat(harmless).calls[0].sampler == {}

    @pytest.mark.parametrize(
        ("body", "param"),
        [
            ({"tools": [{}]}, "tools"),
            ({"tool_choice": "required"}, "tool_choice"),
            ({"functions": [{}]}, "functions"),
            ({"logit_bias": {"1": 2}}, "logit_bias"),
            ({"presence_penalty": 0.1}, "presence_penalty"),
            ({"frequency_penalty": -1}, "frequency_penalty"),
            ({"top_logprobs": 2}, "top_logprobs"),
            ({"reasoning_effort": "high"}, "reasoning_effort"),
            ({"audio": {}}, "audio"),
        ],
    )
    def test_what_would_change_the_answer_is_refused_by_name(self, body, param):
        error = refused(chat, body)
        assert (error.status, error.param, error.code) == (400, param, "unsupported_parameter")
        assert error.message.startswith(param)

    @pytest.mark.parametrize(
        ("body", "param", "words"),
        [
            ({"temperture": 1}, "temperture", "did you mean temperature?"),
            ({"steps": 1}, "steps", "diffusion.steps"),
            ({"diffusion": {"stepz": 1}}, "diffusion.stepz", "did you mean steps?"),
            ({"diffusion": {"max_new_tokens": 1}}, "diffusion.max_new_tokens", "max_tokens"),
            ({"diffusion": {"seed": 1}}, "diffusion.seed", "outside of diffusion"),
            ({"messages": [{"role": "user", "content": "x", "colour": 1}]}, "messages.0.colour", "unknown parameter"),
        ],
    )
    def test_slips_are_refused_with_a_hint(self, body, param, words):
        error = refused(chat, body)
        assert (error.status, error.param, error.code) == (400, param, "unknown_parameter")
        assert words in error.message

    @pytest.mark.parametrize(
        ("body", "param"),
        [
            ({"messages": []}, "messages"),
            ({"messages": "Hello"}, "messages"),
            ({"messages": [{"role": "user"}]}, "messages.0.content"),
            ({"messages": [{"role": "user", "content": None}]}, "messages.0.content"),
            ({"messages": [{"role": "tool", "content": "x"}]}, "messages.0.role"),
            ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages.0.content.0.type"),
            ({"temperature": -0.1}, "temperature"),
            ({"temperature": 2.1}, "temperature"),
            ({"temperature": "1"}, "temperature"),
            ({"temperature": float("nan")}, "temperature"),
            ({"temperature": float("inf")}, "temperature"),
            ({"top_p": 0}, "top_p"),
            ({"n": 0}, "n"),
            ({"n": 129}, "n"),
            ({"n": True}, "n"),
            ({"max_tokens": 0}, "max_tokens"),
            ({"max_tokens": 10**30}, "max_tokens"),
            ({"seed": -1}, "seed"),
            ({"seed": 2**63}, "seed"),
            ({"stop": ["a"] * 5}, "stop"),
            ({"stop": ""}, "stop"),
            ({"stop": [1]}, "stop.0"),
            ({"stream": 1}, "stream"),
            ({"response_format": {"type": "json_object"}}, "response_format.type"),
            ({"diffusion": []}, "diffusion"),
            ({"diffusion": {"policy": "best"}}, "diffusion.policy"),
            ({"diffusion": {"timeout_s": 0}}, "diffusion.timeout_s"),
            ({"diffusion": {"factor": float("inf")}}, "diffusion.factor"),
            ({"diffusion": {"cfg_scale": float("nan")}}, "diffusion.cfg_scale"),
            ({"diffusion": {"stream_canvas": True}}, "diffusion.stream_canvas"),
            ({"temperature": 1, "diffusion": {"temperature": 1}}, "temperature"),
        ],
    )
    def test_values_that_cannot_be_are_refused(self, body, param):
        error = refused(chat, body)
        assert (error.status, error.param) == (400, param)

    @pytest.mark.parametrize(
        "body",
        [
            b"",
            b"{",
            b"[]",
            b"null",
            b'"a"',
            b"\xff\xfe{}",
            b'{"messages": [{"role": "user", "content": "\xff"}]}',
            rb'{"messages": [{"role": "user", "content": "\ud800"}]}',
            b'{"user": ' + b"9" * 100_000 + b"}",
            b'{"user": ' + b"[" * 100_000,
            b'{"messages": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
        ],
        ids=lambda body: str(body[:40]),
    )
    def test_bodies_that_are_no_json_object_are_refused(self, body):
        error = refused(chat, body)
        assert error.status == 400
        assert "body" in error.message or error.param == "messages"

    @pytest.mark.parametrize("body", [b"{}," * 300_000 + b"{}", b"1," * 500_000 + b"1"], ids=["objects", "numbers"])
    def test_a_body_full_of_mistakes_is_refused_at_once(self, body):
        began = time.perf_counter()
        refused(chat, b'{"messages": [' + body + b"]}")
        assert time.perf_counter() - began < 2  # each of them explained would take minutes

    def test_a_model_without_a_template_is_not_talked_to(self):
        from dataclasses import replace

        error = refused(lambda body: chat(body, replace(FACTS, can_chat=False)), {})
        assert (error.status, error.param) == (422, "messages")
        assert "/v1/completions" in error.message

    @given(st.binary(max_size=200))
    def test_no_body_is_a_defect(self, body):
        try:
            chat(body)
        except ApiError as error:
            assert error.status == 400

    @given(
        st.dictionaries(
            st.sampled_from(sorted(protocol.ChatRequest.model_fields)),
            st.recursive(
                st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
                lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
                max_leaves=6,
            ),
        )
    )
    def test_no_value_is_a_defect(self, body):
        try:
            chat({key: value for key, value in body.items() if key != "messages"})
        except ApiError as error:
            assert error.status == 400
            assert error.param


class TestCompletion:
    def test_prompts_of_each_kind(self):
        assert [call.prompt for call in complete({"prompt": "a"}).calls] == ["a"]
        assert [call.prompt for call in complete({"prompt": ["a", "b"]}).calls] == ["a", "b"]
        assert [call.prompt for call in complete({"prompt": [1, 2]}).calls] == [(1, 2)]
        assert [call.prompt for call in complete({"prompt": [[1], [2, 3]]}).calls] == [(1,), (2, 3)]

    def test_calls_of_one_request_have_names_of_their_own(self):
        assert [call.id for call in complete({"prompt": ["a", "b"]}).calls] == ["id-0", "id-1"]

    @pytest.mark.parametrize("prompt", [[], [[]], ["a", 1], [1, "a"], [1.5], [-1], {}, None, [[1], "a"]])
    def test_prompts_that_cannot_be(self, prompt):
        error = refused(complete, {"prompt": prompt})
        assert error.status == 400
        assert error.param.startswith("prompt")

    def test_too_many_prompts(self):
        assert refused(complete, {"prompt": ["a"] * 4}).param == "prompt"

    def test_a_suffix_is_a_gap(self):
        (call,) = complete({"suffix": " the end", "max_tokens": 4}).calls
        assert (call.suffix, call.max_tokens) == (" the end", 4)
        assert complete({"suffix": ""}).calls[0].suffix is None

    def test_a_model_that_fills_no_gaps_says_so(self):
        from dataclasses import replace

        error = refused(lambda body: complete(body, replace(FACTS, can_infill=False)), {"suffix": "x"})
        assert (error.status, error.param) == (422, "suffix")

    def test_what_goes_with_an_echo(self):
        assert complete({"prompt": ["a", "b"], "echo": True}).echoes == ("a", "b")
        assert refused(complete, {"prompt": [1], "echo": True}).param == "echo"
        assert refused(complete, {"echo": True, "logprobs": 0}).param == "echo"

    def test_the_best_of_several_is_not_chosen_here(self):
        assert complete({"n": 2, "best_of": 2}).calls[0].n == 2
        assert complete({"best_of": 1}).calls[0].n == 1
        assert refused(complete, {"best_of": 2}).code == "unsupported_parameter"

    def test_alternatives_of_tokens_are_not_told(self):
        assert complete({"logprobs": 0}).logprobs
        assert refused(complete, {"logprobs": 1}).param == "logprobs"


def test_every_setting_of_the_sampler_has_its_place():
    elsewhere = {"seed", "max_new_tokens", "max_length"}
    options = set(protocol.DiffusionOptions.model_fields) - {"stream_canvas", "timeout_s"}
    assert options == set(SamplerConfig.__dataclass_fields__) - elsewhere
    assert all(field.description for field in protocol.DiffusionOptions.model_fields.values())


@pytest.mark.parametrize(("policy", "measures"), [("low_confidence", True), ("entropy", False), ("topk_margin", False)])
def test_only_probabilities_have_logarithms(policy, measures):
    assert chat({"diffusion": {"policy": policy}}).measures_probability is measures
