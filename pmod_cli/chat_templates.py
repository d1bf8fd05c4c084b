"""Chat templates of LLaVA's conversation formats."""

VICUNA_V1 = (
    "{{ bos_token }}"
    "{% if messages[0]['role'] != 'system' %}"
    '{{ "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, '
    "detailed, and polite answers to the user's questions. \" }}{% endif %}"
    "{% for message in messages %}"
    "{% if message['content'] is string %}{% set parts = [{'type': 'text', 'text': message['content']}] %}"
    "{% else %}{% set parts = message['content'] %}{% endif %}"
    "{% if message['role'] == 'system' %}{% for part in parts %}{{ part['text'] + ' ' }}{% endfor %}"
    "{% elif message['role'] == 'user' %}{{ 'USER: ' }}"
    "{% for part in parts if part['type'] == 'image' %}{{ '<image>\n' }}{% endfor %}"
    "{% for part in parts if part['type'] == 'text' %}{{ part['text'] + ' ' }}{% endfor %}"
    "{% else %}{{ 'ASSISTANT:' }}"
    "{% for part in parts if part['type'] == 'text' %}"
    "{% generation %}{{ ' ' + part['text'] + eos_token }}{% endgeneration %}{% endfor %}"
    "{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)
"""LLaVA's conversation format ``v1`` for Vicuna models, which the paper trained with."""

MISTRAL_INSTRUCT = (
    "{{ bos_token }}"
    "{% for message in messages %}"
    "{% if message['content'] is string %}{% set parts = [{'type': 'text', 'text': message['content']}] %}"
    "{% else %}{% set parts = message['content'] %}{% endif %}"
    "{% if message['role'] == 'system' %}{% for part in parts %}{{ '<<SYS>>\n' + part['text'] + '\n<</SYS>>\n\n' }}"
    "{% endfor %}"
    "{% elif message['role'] == 'user' %}{{ '[INST] ' }}"
    "{% for part in parts if part['type'] == 'image' %}{{ '<image>\n' }}{% endfor %}"
    "{% for part in parts if part['type'] == 'text' %}{{ part['text'] }}{% endfor %}{{ ' [/INST]' }}"
    "{% else %}"
    "{% for part in parts if part['type'] == 'text' %}"
    "{% generation %}{{ ' ' + part['text'] + eos_token }}{% endgeneration %}{% endfor %}"
    "{% endif %}{% endfor %}"
)
"""LLaVA-NeXT's conversation format ``mistral_instruct``."""
