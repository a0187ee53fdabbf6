"""Chats as tokens: which characters of five public chat templates are learned, written out by hand."""

import copy

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from loralab.data.batches import IGNORED
from loralab.errors import UserError
from loralab.objectives import generation, templates

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LLAMA_3 = (
    "{{ '<|begin_of_text|>' }}{% for message in messages %}{{ '<|start_header_id|>' + message['role'] + "
    "'<|end_header_id|>\n\n' + message['content'] | trim + '<|eot_id|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
MISTRAL = (
    "{{ '<s>' }}{% for message in messages %}{% if message['role'] == 'user' %}"
    "{{ '[INST] ' + message['content'] + ' [/INST]' }}{% else %}{{ ' ' + message['content'] + '</s>' }}{% endif %}"
    "{% endfor %}"
)
GEMMA = (
    "{{ '<bos>' }}{% for message in messages %}{{ '<start_of_turn>' + ('model' if message['role'] == 'assistant' else "
    "message['role']) + '\n' + message['content'] + '<end_of_turn>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)
PHI_3 = (
    "{% for message in messages %}{{ '<|' + message['role'] + '|>\n' + message['content'] + '<|end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ '<|endoftext|>' }}{% endif %}"
)
MARKED = (
    "{% for message in messages %}{% if message['role'] == 'assistant' %}A: {% generation %}{{ message['content'] }}|"
    "{% endgeneration %}{% else %}U: {{ message['content'] }}|{% endif %}{% endfor %}"
)
CHAT = (("user", "Hi, who?"), ("assistant", "Ann."), ("user", "Age?"), ("assistant", "Nine of ten"))
BY_HAND = {  # template -> pieces of the text; those in a list are learned
    "ChatML": (CHATML, [
        "<|im_start|>user\nHi, who?<|im_end|>\n<|im_start|>assistant\n", ["Ann.<|im_end|>"],
        "\n<|im_start|>user\nAge?<|im_end|>\n<|im_start|>assistant\n", ["Nine of ten<|im_end|>"], "\n",
    ]),
    "Llama 3": (LLAMA_3, [
        "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\nHi, who?<|eot_id|><|start_header_id|>assistant"
        "<|end_header_id|>\n\n", ["Ann.<|eot_id|>"], "<|start_header_id|>user<|end_header_id|>\n\nAge?<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n", ["Nine of ten<|eot_id|>"],
    ]),
    "Mistral": (MISTRAL, ["<s>[INST] Hi, who? [/INST]", [" Ann.</s>"], "[INST] Age? [/INST]", [" Nine of ten</s>"]]),
    "Gemma": (GEMMA, [
        "<bos><start_of_turn>user\nHi, who?<end_of_turn>\n<start_of_turn>model\n", ["Ann.<end_of_turn>"],
        "\n<start_of_turn>user\nAge?<end_of_turn>\n<start_of_turn>model\n", ["Nine of ten<end_of_turn>"], "\n",
    ]),
    "Phi 3": (PHI_3, [
        "<|user|>\nHi, who?<|end|>\n<|assistant|>\n", ["Ann.<|end|>"], "\n<|user|>\nAge?<|end|>\n<|assistant|>\n",
        ["Nine of ten<|end|>\n<|endoftext|>"],
    ]),
    "marked": (MARKED, ["U: Hi, who?|A: ", ["Ann.|"], "U: Age?|A: ", ["Nine of ten|"]]),
}  # fmt: skip


@pytest.fixture(scope="module")
def letters() -> PreTrainedTokenizerFast:
    """A tokenizer whose tokens are bytes."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    model = Tokenizer(models.BPE({c: i for i, c in enumerate([*alphabet, "<end>"])}, []))
    model.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.decoder = decoders.ByteLevel()
    made = PreTrainedTokenizerFast(tokenizer_object=model, eos_token="<end>", pad_token="<end>")
    made.add_special_tokens({"additional_special_tokens": ["<|user|>", "<|assistant|>", "<|end|>", "<|endoftext|>"]})
    return made


@pytest.mark.parametrize("loss_on", ["auto", "assistant", "completion", "all"])
@pytest.mark.parametrize("name", BY_HAND)
def test_the_assistants_words_are_learned(name, loss_on, letters):
    template, pieces = BY_HAND[name]
    found = templates.tokens(CHAT, letters, {"template": template, "loss_on": loss_on})
    assert letters.decode(found.ids) == "".join(p if isinstance(p, str) else p[0] for p in pieces)
    last = max(i for i, piece in enumerate(pieces) if isinstance(piece, list))
    expected = []
    for i, piece in enumerate(pieces):
        learned = loss_on == "all" or (isinstance(piece, list) and (loss_on != "completion" or i == last))
        expected += [learned] * len(letters(piece if isinstance(piece, str) else piece[0])["input_ids"])
    assert [label != IGNORED for label in found.labels] == expected
    assert all(label in (IGNORED, i) for i, label in zip(found.ids, found.labels, strict=True))


ENDS = {"Phi 3": "<|end|>", "marked": None}  # those of the other templates are no special tokens of `letters`


@pytest.mark.parametrize("loss_on", ["auto", "completion", "all"])
@pytest.mark.parametrize("name", BY_HAND)
def test_the_end_of_an_answer_is_the_special_token_that_is_learned_behind_it(name, loss_on, letters):
    template, options = BY_HAND[name][0], {"loss_on": loss_on}
    found = templates.end_of([("text",), CHAT], letters, {**options, "template": template})
    assert found == (letters.convert_tokens_to_ids(ENDS[name]) if ENDS.get(name) else None)
    ending = template.replace("<|im_end|>", "<end>").replace("<end_of_turn>", "<end>").replace("<|eot_id|>", "<end>")
    if ending != template:
        assert templates.end_of([CHAT], letters, {**options, "template": ending}) == letters.eos_token_id
    assert templates.end_of([("text",)], letters, options) is None


def test_prompt_and_completion_are_one_text_whose_end_is_learned(letters):
    found = templates.tokens(("2+2=", "four"), letters, {})
    assert letters.decode(found.ids) == "2+2=four<end>"
    assert [label != IGNORED for label in found.labels] == [False] * 4 + [True] * 5
    whole = templates.tokens(("2+2=", "four"), letters, {"loss_on": "all"})
    assert whole.labels == whole.ids == found.ids
    text = templates.tokens(("four",), letters, {})
    assert text.labels == text.ids
    assert text.learned == 4  # nothing predicts the first


@pytest.mark.parametrize("ends", ["", " <end>", " <|end|>"])
@pytest.mark.parametrize("begins", ["", "<|user|> "])
@pytest.mark.parametrize("prompt", ["2+2=", "2+2=<end>", "2+2=<|end|>"])
def test_an_answer_is_written_after_the_tokens_that_it_is_learned_after(prompt, begins, ends, letters):
    """Also with a tokenizer that ends a text: answers were written after its end token."""
    tokenizer = copy.deepcopy(letters)
    special = [(name, tokenizer.convert_tokens_to_ids(name)) for name in ("<end>", "<|end|>", "<|user|>")]
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{begins}$A{ends}", special_tokens=special
    )
    learned = templates.tokens((prompt, "four"), tokenizer, {})
    before = [i for i, label in zip(learned.ids, learned.labels, strict=True) if label == IGNORED]
    assert generation.prompt_ids((prompt,), tokenizer) == before
    assert tokenizer.decode(before) == begins.strip() + prompt
    answer = [i for i in learned.labels if i != IGNORED]
    assert answer[-1] == tokenizer.eos_token_id
    assert answer.count(tokenizer.eos_token_id) == 1


@pytest.mark.parametrize("mark", ["{% generation %}", "{%- generation -%}", "{%generation%}", "{%+ generation +%}"])
def test_every_spelling_of_the_mark_counts(mark, letters):
    """The template forgets what the assistant said before, so only its marks can say what is learned."""
    template = "{% for m in messages %}{% if loop.last %}" + mark + "{{ m['content'] }}|{% endgeneration %}{% endif %}"
    found = templates.tokens(CHAT, letters, {"template": template + "{% endfor %}"})
    assert letters.decode([label for label in found.labels if label != IGNORED]) == "Nine of ten|"


BAD = {
    "marks nothing": (
        "{% for m in messages %}{{ m['content'] }}|{% generation %}{% endgeneration %}{% endfor %}",
        "nothing of this chat lies within them",
    ),
    "forgets": (
        "{% for m in messages %}{% if loop.last or m['role'] == 'user' %}{{ m['content'] }}|{% endif %}{% endfor %}",
        "changes earlier messages",
    ),
    "raises": ("{{ raise_exception('no system') }}", "no system"),
    "is no template": ("{% for %}", "cannot show this chat"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_template_that_cannot_be_masked_is_refused_with_the_reason(case, letters):
    template, words = BAD[case]
    with pytest.raises(UserError, match=words):
        templates.tokens(CHAT, letters, {"template": template})


def test_a_tokenizer_without_template_or_end_is_refused(letters):
    with pytest.raises(UserError, match="--template"):
        templates.tokens(CHAT, letters, {})
    bare = PreTrainedTokenizerFast(tokenizer_object=letters.backend_tokenizer)
    with pytest.raises(UserError, match="no end-of-text token"):
        templates.tokens(("a", "b"), bare, {})
    with pytest.raises(UserError, match="--loss-on assistant"):
        templates.tokens(("a", "b"), letters, {"loss_on": "assistant"})
