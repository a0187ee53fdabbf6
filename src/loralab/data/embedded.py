"""An acceptability task that needs no download: minimal pairs written by a small grammar, labelled as in CoLA.

The idea is BLiMP's (Warstadt et al., 2020): sentences come in pairs that differ in one place and of which one is
acceptable. The form is CoLA's (Warstadt et al., 2019). First the words and sentence patterns, then the code that fills
the patterns.

A word class is one string of words separated by spaces; a word is its forms, joined by "/". The classes of `WORDS` are
content words, and each split has its own; `CLOSED` has the function words, which both splits need.

A pattern is a sentence of slots. A slot is a literal word, or `class:form`, where form is a place in the word (`FORMS`)
or a feature (`FEATURES`), drawn once per sentence; `-n` is another value of feature n. A class alone is its first form.
`good|bad` is the place where the two sentences of a pair differ (one side may be empty); both sides draw the same word
if their class is the same. A final `?` makes a word optional. No word is used twice in one sentence.
"""

from random import Random
from typing import NamedTuple

from loralab.data.task import Split, Task, build

PAIRS = {"train": 250, "validation": 60}  # per phenomenon: an epoch takes seconds, Matthews is known to about 0.03
SEED = 0  # part of the task: another seed is another task

FORMS = {"base": 1, "past": 2, "object": 1}  # "sleeps/sleep/slept", "he/him": the first form, 0, has no name
FEATURES = {"n": 2, "m": 2, "h": 2, "g": 3}  # n, m: singular, plural; h: he, she; g: he, she, they

CLOSED: dict[str, str] = {
    "prep": "near behind beside opposite",
    "be": "is/are was/were",
    "was": "was/were",
    "do": "does/do",
    "this": "this/these that/those",
    "each": "each/many every/several one/two",
    "self": "himself/herself/themselves",
    "he": "he/him she/her they/them",
    "she": "he/she/they",
    "they": "he/they she/they",
    "here": "here there today",
}

WORDS: dict[str, dict[str, str]] = {
    "train": {
        "noun": """teacher/teachers doctor/doctors student/students lawyer/lawyers artist/artists writer/writers
            singer/singers driver/drivers farmer/farmers soldier/soldiers officer/officers pilot/pilots nurse/nurses
            judge/judges manager/managers banker/bankers guard/guards dancer/dancers neighbor/neighbors friend/friends
            author/authors editor/editors actor/actors engineer/engineers scientist/scientists visitor/visitors
            worker/workers player/players critic/critics detective/detectives""",
        "person": """man/woman/men boy/girl/girls father/mother/mothers uncle/aunt/uncles prince/princess/princes
            waiter/waitress/waitresses husband/wife/wives monk/nun/monks nephew/niece/nieces
            gentleman/widow/widows""",
        "name": """John/Mary James/Sarah David/Laura Robert/Anna Michael/Emily Paul/Susan Peter/Jane Tom/Linda
            George/Helen Henry/Julia Daniel/Rachel Simon/Alice Joseph/Emma Philip/Ruth Arthur/Clara""",
        "thing": """table/tables door/doors bridge/bridges house/houses river/rivers car/cars tree/trees road/roads
            garden/gardens lake/lakes tower/towers wall/walls window/windows boat/boats church/churches hotel/hotels
            station/stations gate/gates fence/fences castle/castles""",
        "likes": """praises/praise/praised blames/blame/blamed admires/admire/admired ignores/ignore/ignored
            hires/hire/hired greets/greet/greeted rescues/rescue/rescued punishes/punish/punished
            protects/protect/protected respects/respect/respected surprises/surprise/surprised catches/catch/caught
            arrests/arrest/arrested insults/insult/insulted thanks/thank/thanked likes/like/liked
            contacts/contact/contacted defeats/defeat/defeated encourages/encourage/encouraged
            recognizes/recognize/recognized""",
        "buys": """destroys/destroy/destroyed builds/build/built buys/buy/bought owns/own/owned carries/carry/carried
            repairs/repair/repaired damages/damage/damaged wants/want/wanted brings/bring/brought
            removes/remove/removed""",
        "sleeps": """smiles/smile/smiled sleeps/sleep/slept laughs/laugh/laughed waits/wait/waited cries/cry/cried
            arrives/arrive/arrived nods/nod/nodded talks/talk/talked dies/die/died stays/stay/stayed
            disappears/disappear/disappeared listens/listen/listened complains/complain/complained
            trembles/tremble/trembled grins/grin/grinned shrugs/shrug/shrugged giggles/giggle/giggled
            frowns/frown/frowned rises/rise/rose travels/travel/traveled shivers/shiver/shivered gasps/gasp/gasped""",
        "knows": """knows/know/knew remembers/remember/remembered forgets/forget/forgot notices/notice/noticed
            learns/learn/learned discovers/discover/discovered sees/see/saw hears/hear/heard realizes/realize/realized
            understands/understand/understood""",
        "old": """old young happy tired clever rich famous strange brave angry gentle lonely nervous proud polite
            honest busy quiet""",
    },
    "validation": {
        "noun": """poet/poets priest/priests hunter/hunters sailor/sailors painter/painters reporter/reporters
            professor/professors senator/senators captain/captains customer/customers agent/agents coach/coaches
            merchant/merchants musician/musicians leader/leaders director/directors""",
        "person": """king/queen/kings brother/sister/sisters son/daughter/daughters lord/lady/ladies
            duke/duchess/dukes""",
        "name": """William/Elizabeth Thomas/Rebecca Richard/Karen Charles/Margaret Edward/Lisa Steven/Nancy
            Andrew/Diana Kevin/Maria""",
        "thing": """building/buildings truck/trucks hill/hills statue/statues fountain/fountains bench/benches
            store/stores piano/pianos theater/theaters shop/shops ship/ships temple/temples""",
        "likes": """accuses/accuse/accused rewards/reward/rewarded invites/invite/invited chases/chase/chased
            dismisses/dismiss/dismissed confronts/confront/confronted betrays/betray/betrayed
            abandons/abandon/abandoned describes/describe/described accompanies/accompany/accompanied hates/hate/hated
            captures/capture/captured replaces/replace/replaced mentions/mention/mentioned""",
        "buys": """uses/use/used needs/need/needed designs/design/designed collects/collect/collected
            creates/create/created""",
        "sleeps": """sighs/sigh/sighed departs/depart/departed appears/appear/appeared vanishes/vanish/vanished
            prays/pray/prayed hesitates/hesitate/hesitated chuckles/chuckle/chuckled comes/come/came goes/go/went
            emerges/emerge/emerged struggles/struggle/struggled screams/scream/screamed coughs/cough/coughed
            weeps/weep/wept""",
        "knows": """reveals/reveal/revealed explains/explain/explained guesses/guess/guessed reports/report/reported
            announces/announce/announced recalls/recall/recalled confirms/confirm/confirmed""",
        "old": "tall poor smart sad calm serious cruel wise shy strong lazy friendly foreign",
    },
}

# Patterns come in couples, or flip a feature that is drawn evenly, so that a word is as often right as wrong. Few have
# an attractor (a noun between that would ask for the other form): where most had one, nothing was learned in 4 epochs.
PATTERNS: dict[str, tuple[str, ...]] = {
    "subject-verb agreement": (
        "they:n be:n|be:-n old .",
        "the noun:n sleeps:n|sleeps:-n .",
        "the noun:n be:n|be:-n old .",
        "the old? noun:n sleeps:n|sleeps:-n here .",
        "do:n|do:-n the noun:n sleeps:base ?",
        "the noun:n prep the noun:-n be:n|be:-n old .",
    ),
    "determiner-noun agreement": (
        "name:h likes:past this:n|this:-n noun:n .",
        "this:n noun:n|noun:-n sleeps:past .",
        "name:h buys:past this:n|this:-n thing:n .",
        "this:n old noun:n|noun:-n sleeps:past .",
        "the noun:m likes:past each:n|each:-n noun:n .",
        "this:n noun:n|noun:-n prep the thing:m sleeps:past .",
    ),
    "reflexives": (
        "she:g likes:past self:g|self:-g .",
        "name:h likes:past self:h|self:-h .",
        "the person:g likes:past self:g|self:-g .",
        "the old? person:g likes:past self:g|self:-g here .",
        "name:-h knows:past that name:h likes:past self:h|self:-h .",
        "the person:g prep the person:-g likes:past self:g|self:-g .",
    ),
    "argument structure": (
        "the noun:n sleeps:past|likes:past .",
        "the noun:n likes:past|sleeps:past name:h .",
        "name:h sleeps:past|likes:past here .",
        "name:h likes:past|sleeps:past the noun:m .",
        "did the noun:n sleeps:base|likes:base ?",
        "was:n the noun:n likes:past|sleeps:past by name:h ?",
    ),
    "filler-gap": (
        "who did name:h likes:base |he:object ?",
        "did name:h likes:base he:object| ?",
        "name:h knows:past who|that the noun:m likes:past .",
        "name:h knows:past that|who the noun:m likes:past he:object .",
        "name:h knows:past what|that the noun:m buys:past .",
        "name:h knows:past that|what the noun:m buys:past the thing:n .",
        "the noun:n who name:h likes:past |he:object sleeps:past .",
        "the noun:n knows:past that name:h likes:past he:object| .",
    ),
    "pronoun case": (
        "he|he:object likes:past name:h .",
        "name:h likes:past he:object|he .",
        "he|he:object sleeps:past here .",
        "the noun:n likes:past he:object|he here .",
        "did he|he:object sleeps:base ?",
        "did the noun:n likes:base he:object|he ?",
    ),
}


class Pair(NamedTuple):
    """Two sentences that differ in one place."""

    phenomenon: str
    split: str
    good: str
    bad: str


def load() -> Task:
    """Make the task: the same sentences in the same order on every machine."""
    every_pair = pairs()
    return build(
        "minimal-pairs",
        labels=("unacceptable", "acceptable"),
        metrics=("matthews_correlation", "accuracy"),
        train=_split("train", every_pair),
        validation={"validation": _split("validation", every_pair)},
        notes=("generated by a grammar; validation shares no noun, verb, name or adjective with train",),
    )


def pairs() -> list[Pair]:
    """Return all minimal pairs of both splits, by phenomenon. The patterns of a phenomenon are used in turn."""
    rng = Random(SEED)
    used: set[str] = set()
    made: list[Pair] = []
    for split, count in PAIRS.items():
        for phenomenon, patterns in PATTERNS.items():
            done = 0
            while done < count:
                good, bad = _sentences(patterns[done % len(patterns)], split, rng)
                if good in used or bad in used:
                    continue
                used |= {good, bad}
                made.append(Pair(phenomenon, split, good, bad))
                done += 1
    return made


def word_forms(split: str) -> dict[str, list[list[str]]]:
    """Return the words that a split may use: class -> words -> forms."""
    return {name: [word.split("/") for word in text.split()] for name, text in (CLOSED | WORDS[split]).items()}


def _split(split: str, every_pair: list[Pair]) -> Split:
    """Return one split, shuffled. Of `Random` only random() is used: every Python version promises its values."""
    chosen = [pair for pair in every_pair if pair.split == split]
    labelled = [(pair.good, 1) for pair in chosen] + [(pair.bad, 0) for pair in chosen]
    rng = Random(SEED)
    labelled.sort(key=lambda _: rng.random())
    return Split(texts=[(text,) for text, _ in labelled], labels=[label for _, label in labelled])


def _sentences(pattern: str, split: str, rng: Random) -> tuple[str, str]:
    """Return the acceptable and the unacceptable sentence of a pattern, with words and features drawn by `rng`."""
    classes, features = word_forms(split), _features(rng)
    good, bad = [], []
    for slot in pattern.split():
        if slot.endswith("?") and len(slot) > 1:
            slot = slot[:-1] if rng.random() < 0.5 else ""
        right, differs, wrong = slot.partition("|")
        drawn: dict[str, list[str]] = {}
        good.append(_word(right, classes, drawn, features, rng))
        bad.append(_word(wrong, classes, drawn, features, rng) if differs else good[-1])
    return _sentence(good), _sentence(bad)


def _features(rng: Random) -> dict[str, int]:
    """Draw a value for each feature n, and another one under the name -n."""
    values = {}
    for name, size in FEATURES.items():
        values[name] = int(rng.random() * size)
        values["-" + name] = (values[name] + 1 + int(rng.random() * (size - 1))) % size
    return values


def _word(
    slot: str, classes: dict[str, list[list[str]]], drawn: dict[str, list[str]], features: dict[str, int], rng: Random
) -> str:
    """Return the word for a slot: the literal, or a form of a drawn word, which is removed from `classes`."""
    name, _, form = slot.partition(":")
    if name not in classes:
        return slot
    if name not in drawn:
        drawn[name] = classes[name].pop(int(rng.random() * len(classes[name])))
    return drawn[name][(FORMS | features)[form] if form else 0]


def _sentence(words: list[str]) -> str:
    *body, mark = [word for word in words if word]
    sentence = " ".join(body)
    return sentence[0].upper() + sentence[1:] + mark
