"""Answers of a language model: transformers' `generate` on prompts, and what an answer is worth against the right one.

A prompt is a text, or a chat that ends with the user. Prompts of a batch are padded on the left, so that each ends
where its answer begins; those of an encoder-decoder, which writes its answer apart, on the right.
"""

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from loralab.data import chats
from loralab.data.batches import Done, batch_width, longest, sorted_batches, tokenized, unknown_tokens, unwatched
from loralab.errors import UserError
from loralab.objectives import templates

STARTS = 100  # brackets of an answer at which JSON may begin; each that fails reads on to where it does

# ---- how answers are decoded -----------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Decoding:
    """How an answer is written, by transformers' names. Raises UserError for values that cannot be."""

    max_new_tokens: int = 256
    """Most tokens of an answer."""
    temperature: float | None = None
    """Sample at this temperature; without --temperature, --top-p and --top-k the likeliest token is taken."""
    top_p: float | None = None
    """Sample from the likeliest tokens that have this share of the probability."""
    top_k: int | None = None
    """Sample from this many of the likeliest tokens."""
    num_beams: int = 1
    """Beams of beam search."""
    num_return_sequences: int = 1
    """Answers to each prompt."""
    seed: int = 0
    """Seed of sampling: it decides all answers of one process, in their order."""
    stop: tuple[str, ...] = ()
    """Texts after which an answer ends."""

    def __post_init__(self) -> None:
        if problems := self._problems():
            raise UserError("; ".join(problems))

    def _problems(self) -> list[str]:
        least = {"max_new_tokens": 1, "top_k": 1, "num_beams": 1, "num_return_sequences": 1, "seed": 0}
        given = {name: getattr(self, name) for name in least}
        problems = [
            f"{_flag(name)} {value}: expected {least[name]} or more"
            for name, value in given.items()
            if value is not None and value < least[name]
        ]
        if self.temperature is not None and not 0 < self.temperature < float("inf"):
            problems.append(f"--temperature {self.temperature}: expected above 0, or leave it out for greedy answers")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            problems.append(f"--top-p {self.top_p}: expected a share, above 0 and at most 1")
        if not self.samples and self.num_return_sequences > self.num_beams:
            problems.append(
                f"--num-return-sequences {self.num_return_sequences}: greedy answers are all the same; add --num-beams "
                f"{self.num_return_sequences}, or --temperature to sample"
            )
        if "" in self.stop:
            problems.append("--stop: a text was expected, this one is empty")
        return problems

    @property
    def samples(self) -> bool:
        """Whether tokens are drawn."""
        return any(value is not None for value in (self.temperature, self.top_p, self.top_k))

    def random(self) -> torch.Generator:
        """Return what seeds the batches of sampled answers, one after the other."""
        return torch.Generator().manual_seed(self.seed)

    @property
    def copies(self) -> int:
        """How often transformers repeats each row of a batch."""
        return max(self.num_beams, self.num_return_sequences)

    def arguments(self, model: Any, tokenizer: Any, ends: Sequence[int] = ()) -> dict[str, Any]:
        """Return the arguments of `model.generate`; an answer ends with one of `end_tokens`."""
        drawn = {
            "temperature": 1.0 if self.temperature is None else self.temperature,
            "top_p": 1.0 if self.top_p is None else self.top_p,
            "top_k": self.top_k or 0,  # 0: all of them
        }
        return {
            "max_new_tokens": self.max_new_tokens,
            "do_sample": self.samples,
            "num_beams": self.num_beams,
            "num_return_sequences": self.num_return_sequences,
            "eos_token_id": end_tokens(model, tokenizer, ends),
            "pad_token_id": tokenizer.pad_token_id,
            **(drawn if self.samples else {}),
        }


def end_tokens(model: Any, tokenizer: Any, ends: Sequence[int] = ()) -> list[int]:
    """Return the tokens that end an answer: the model's, the tokenizer's, and the `ends` that an adapter learned."""
    own = model.generation_config.eos_token_id
    return sorted({*(own if isinstance(own, list) else [own]), tokenizer.eos_token_id, *ends} - {None})


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


# ---- prompts ---------------------------------------------------------------------------------------------------------


def prompt_ids(prompt: chats.Row, tokenizer: Any, template: str | None = None) -> list[int]:
    """Return the tokens of a decoder's prompt: of a chat through the template, where the assistant is about to speak.

    Raises UserError for a chat that the template cannot show.
    """
    if not chats.is_chat(prompt):
        return templates.to_be_continued(prompt[0], tokenizer)
    text = templates.before_answer(prompt, tokenizer, template)
    return list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])


def source_ids(source: chats.Row, tokenizer: Any, max_length: int) -> list[int]:
    """Return the tokens of what an encoder-decoder reads, cut as in training."""
    columns, _ = tokenized([source], tokenizer, max_length)
    return list(columns["input_ids"][0])


def check_length(ids: Sequence[int], model: Any, decoding: Decoding) -> None:
    """Raise UserError for a prompt without tokens, and for one that the model cannot take, alone or with its answer."""
    most = longest(model)
    if not ids:
        raise UserError("a prompt without tokens")
    if fault := unknown_tokens(ids, model):
        raise UserError(fault)
    if most is not None and len(ids) + decoding.max_new_tokens > most:
        raise UserError(
            f"a prompt of {len(ids)} tokens and an answer of up to {decoding.max_new_tokens} are more than the {most} "
            "that the model takes: shorten the prompt, or lower --max-new-tokens"
        )


# ---- answers ---------------------------------------------------------------------------------------------------------


@torch.no_grad()
def answers(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[Sequence[int]],
    decoding: Decoding,
    random: torch.Generator,
    ends: Sequence[int] = (),
    streamer: Any = None,
) -> list[list[str]]:
    """Return the answers to each prompt of a batch, `num_return_sequences` of each.

    Rows are repeated by beams and by answers, each next to itself, as `repeat_interleave` does; so must be the ids of
    adapters in use. The caller says what is cached. `random` is `decoding.random()`, the same for all batches, so that
    equal prompts of two batches are answered by draws of their own. `ends` are tokens that end an answer besides those
    of the model, `streamer` is transformers', for one prompt.
    """
    apart = bool(model.config.is_encoder_decoder)
    ids, mask = _padded(prompts, tokenizer.pad_token_id, left=not apart)  # (rows, t)
    device = next(model.parameters()).device
    width = 0 if apart else ids.shape[1]
    stops = [_stops(tokenizer, width, decoding.stop)] if decoding.stop else None
    with torch.random.fork_rng(enabled=decoding.samples), _contiguous_inputs(model.get_output_embeddings()):
        if decoding.samples:
            torch.manual_seed(int(torch.randint(2**63 - 1, (), generator=random)))
        whole = model.generate(
            input_ids=ids.to(device),
            attention_mask=mask.to(device),
            streamer=streamer,
            stopping_criteria=stops,
            **decoding.arguments(model, tokenizer, ends),
        )  # (rows * answers, t + new)
    texts = tokenizer.batch_decode(whole[:, width:], skip_special_tokens=True)
    texts = [_until(text, decoding.stop) for text in texts]
    each = decoding.num_return_sequences
    return [texts[i : i + each] for i in range(0, len(texts), each)]


@contextmanager
def _contiguous_inputs(layer: Any) -> Iterator[None]:
    """Give the output layer what lies together in memory: `generate` asks it for the last token of each prompt.

    That is a slice, for which torch copies a frozen weight once for each row, 57 MB each on smollm2 in bfloat16.
    """
    if layer is None:
        yield
        return
    hook = layer.register_forward_pre_hook(lambda _, args: tuple(arg.contiguous() for arg in args))
    try:
        yield
    finally:
        hook.remove()


def in_batches(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[Sequence[int]],
    decoding: Decoding,
    batch_size: int,
    random: torch.Generator,
    ends: Sequence[int] = (),
    done: Done = unwatched,
) -> list[list[str]]:
    """Return the answers to each prompt, in order; prompts of like length share batches.

    `random` and `ends` are as above; `done` is called with the number of rows of every batch that is answered.
    """
    found: list[list[str]] = [[]] * len(prompts)
    for chosen in sorted_batches(list(map(len, prompts)), batch_size):
        asked = [prompts[i] for i in chosen]
        for i, texts in zip(chosen, answers(model, tokenizer, asked, decoding, random, ends), strict=True):
            found[i] = texts
        done(len(chosen))
    return found


def _padded(prompts: Sequence[Sequence[int]], pad: int, left: bool) -> tuple[Tensor, Tensor]:
    """Return tokens and attention mask (rows, t) of prompts."""
    t = batch_width(max(map(len, prompts)))
    ids, mask = torch.full((len(prompts), t), pad), torch.zeros(len(prompts), t, dtype=torch.long)
    for row, prompt in enumerate(prompts):
        part = slice(t - len(prompt), t) if left else slice(len(prompt))
        ids[row, part], mask[row, part] = torch.tensor(prompt), 1
    return ids, mask


def _stops(tokenizer: Any, width: int, stop: Sequence[str]) -> Callable[..., Tensor]:
    """Return transformers' criterion of rows whose answer has one of these texts.

    Its own reads the vocabulary instead of the answer, and fails with a vocabulary of words.
    """

    def ended(ids: Tensor, scores: Any, **more: Any) -> Tensor:
        texts = tokenizer.batch_decode(ids[:, width:], skip_special_tokens=True)
        return torch.tensor([any(word in text for word in stop) for text in texts], device=ids.device)  # (rows,)

    return ended


def _until(text: str, stop: Sequence[str]) -> str:
    """Return a text up to the first of the texts that end it, which transformers leaves in."""
    return text[: min((place for word in stop if (place := text.find(word)) >= 0), default=len(text))]


# ---- what an answer is worth -----------------------------------------------------------------------------------------


def exact(answer: str, wanted: str) -> float:
    """Return 1 for the same text, spaces around it aside."""
    return float(answer.strip() == wanted.strip())


def same_json(answer: str, wanted: str) -> float:
    """Return 1 where the first JSON object or list of an answer, whatever stands around it, equals the wanted one."""
    found = first_json(answer)
    return float(found is not None and _typed(found) == _typed(json.loads(wanted)))


def first_json(text: str) -> Any:
    """Return the first JSON object or list in a text; None if none begins at its first STARTS brackets."""
    decoder = json.JSONDecoder()
    for place in islice((place for place, char in enumerate(text) if char in "{["), STARTS):
        try:
            return decoder.raw_decode(text, place)[0]
        except ValueError:
            continue
        except RecursionError:  # nested deeper than Python reads
            return None
    return None


def _typed(value: Any) -> Any:
    """Return a value in which true is not 1; 1 and 1.0 stay one number."""
    if isinstance(value, dict):
        return {key: _typed(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_typed(inner) for inner in value]
    return ("bool", value) if isinstance(value, bool) else value


def rouge_l(answer: str, wanted: str) -> float:
    """Return ROUGE-L's F, of the package rouge-score. Raises UserError where the package is absent."""
    if find_spec("rouge_score") is None:
        raise UserError("--generate-metric rouge needs the package rouge-score: pip install 'loralab[rouge]'")
    from rouge_score.rouge_scorer import RougeScorer

    return float(RougeScorer(["rougeL"]).score(wanted, answer)["rougeL"].fmeasure)


METRICS: dict[str, Callable[[str, str], float]] = {"exact": exact, "json": same_json, "rouge": rouge_l}
