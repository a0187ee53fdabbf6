"""The tokens of a prompt, as its adapter learned prompts: of a text as it is, of a turn of the user, of a source."""

from typing import Any

from loralab.data import chats
from loralab.data.batches import cut_at, unknown_tokens
from loralab.errors import UserError
from loralab.objectives import generation
from loralab.objectives.causal import labelled
from loralab.objectives.generation import Decoding
from loralab.objectives.saved import Saved


def prompt_tokens(
    prompt: chats.Row,
    known: Saved | None,
    model: Any,
    tokenizer: Any,
    decoding: Decoding,
    template: str | None = None,
    as_it_is: bool = False,
) -> list[int]:
    """Return the tokens of a text, or of a chat that ends with the user, for an adapter that was trained on `known`.

    A text becomes a turn of the user, unless the adapter was trained on texts as they are, there is no chat template,
    or `as_it_is` says so; of one that was trained on labels as completions it asks for the label. A decoder refuses a
    prompt that leaves no room for its answer; an encoder-decoder cuts the source where training did. Raises UserError
    for what cannot be answered.
    """
    if model.config.is_encoder_decoder:
        return _source(prompt, known, model, tokenizer)
    template = template_of(known, template)
    on_texts = known is not None and known.takes_texts
    plain = as_it_is or on_texts or (template or tokenizer.chat_template) is None
    if known is not None and known.labels is not None and not as_it_is and not chats.is_chat(prompt):
        prompt = labelled(prompt[0])
    row = prompt if plain or chats.is_chat(prompt) else (("user", prompt[0]),)
    ids = generation.prompt_ids(row, tokenizer, template)
    generation.check_length(ids, model, decoding)
    return ids


def template_of(known: Saved | None, given: str | None = None) -> str | None:
    """Return the chat template that is given, or the one an adapter was trained with; None: the tokenizer's."""
    return given or (None if known is None else known.template)


def _source(prompt: chats.Row, known: Saved | None, model: Any, tokenizer: Any) -> list[int]:
    if chats.is_chat(prompt):
        raise UserError("a chat for an encoder-decoder, which reads one text: give the text")
    most = cut_at(None if known is None else known.max_length, model)
    ids = generation.source_ids(prompt, tokenizer, most)
    if fault := unknown_tokens(ids, model):
        raise UserError(fault)
    return ids
