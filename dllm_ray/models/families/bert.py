"""BERT, RoBERTa and ModernBERT, plain or trained to chat: encoders are diffusion models as transformers ships them."""

from dllm_ray.models.families.base import Family

TEMPLATE = (
    "{% for message in messages %}"
    "{% set marks = {'system': ('[SYS]', '[/SYS]'), 'user': ('[Question]', '[/Question]'), "
    "'assistant': ('[Answer]', '[/Answer]')} %}"
    "{% if message['role'] not in marks %}"
    "{{ raise_exception('the role ' + message['role'] ~ ' is not system, user or assistant') }}"
    "{% endif %}"
    "{{ marks[message['role']][0] + '\n' + message['content'] + '\n' + marks[message['role']][1] + '\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '[Answer]\n' }}{% endif %}"
)


def _family(name: str, architecture: str) -> Family:
    return Family(
        name=name,
        native=name,
        model_types=(name,),
        architectures=(architecture,),
        eot_text="[/Answer]",
        chat_template=TEMPLATE,
        sampler={"policy": "low_confidence", "block_size": 32},
    )


FAMILIES = (
    _family("bert", "BertForMaskedLM"),
    _family("roberta", "RobertaForMaskedLM"),
    _family("modernbert", "ModernBertForMaskedLM"),
)
