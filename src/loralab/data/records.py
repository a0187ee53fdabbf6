"""A task for decoders that needs no download: a person described in a sentence or two, to be written as JSON.

A record has eight fields, of which it says five to eight. First the words and the wordings, then the code that fills
them. The words of `WORDS` (names, towns, trades, languages, nicknames) are not shared by train and validation. Some
records are unusual: an age in words, money that is owed, an empty list, a name of several parts.
"""

import json
from collections.abc import Callable
from random import Random
from typing import Any

from loralab.data.task import Split, Task, build

NAME = "records"
ROWS = {"train": 2000, "validation": 200}
SEED = 0  # part of the task: another seed is another task
FEWEST, MOST = 5, 8  # fields of a record, with the name
METRICS = ("loss", "perplexity", "token_accuracy")  # of objective causal; `--generate-metric json` reads the answers

QUESTION = (
    "As JSON: name, age, city, job, languages (list), member (true/false), balance (below 0 if owed), alias; "
    "only what is said.\n\n"
)

WORDS: dict[str, dict[str, str]] = {
    "train": {
        "first": "Ada Boris Chloe Daniel Elif Farid Greta Hugo Ines Jamal Keiko Lars Mira Nils Olga Pedro Rosa Samir "
        "Tara Viktor Wanda Yusuf Zoe Anton Bella Carlos Dora Emil Fatima Georg Hanna Ivan Julia Kamil Lucia "
        "Mateo Noor Otto Petra Qasim Rita Stefan Tove Ulrich Vera Willem Xenia Ylva Zita Agnes Bjorn Clara "
        "Denis Elena Frida Goran Heidi Igor Jana Karl",
        "last": "Okafor Lindqvist Moreno Novak Tanaka Haddad Keller Rossi Silva Dubois Larsen Petrov Nagy Costa "
        "Weber Yilmaz Fischer Kowalski Andersson Brandt Conti Dvali Esposito Ferrari Gomez Hansen Ivanov "
        "Jensen Kovacs Lopez Marini Nilsen Olsen Popov Quist Romero Schmidt Torres Urban Virtanen Wagner "
        "Zeman O'Brien Ruiz-Soler|van_der_Berg de_la_Cruz Al-Amin D'Angelo Mac_Neill Saint-Clair",
        "city": "Porto Oslo Lyon Graz Turin Ghent Malmo Seville Tampere Riga Leeds Cork Basel Split Zadar Utrecht "
        "Bergen Nantes Toulouse Bologna Krakow Gdansk Leipzig Kassel Toledo Murcia Faro Odense Espoo Tartu "
        "Kaunas Dundee Derry Namur Trento Varna Pecs Kosice Ostrava Maribor Antwerp Brno Coimbra Dresden "
        "Essen Florence Geneva Halle Innsbruck Jerez Kiel Lugano Modena Namsos Oviedo Palermo Rostock Siena "
        "Trieste Udine Verona Wroclaw Zagreb Aalborg Bremen Delft Fulda Huelva Imola Lahti|Den_Helder "
        "San_Marino Bad_Ischl",
        "job": "glazier baker nurse plumber tailor pilot welder dentist florist barber teacher mason farmer "
        "printer carpenter butcher chemist courier cook translator optician engineer librarian shepherd "
        "locksmith painter electrician vet fisher saddler actor archivist architect auditor banker "
        "beekeeper biologist blacksmith bookkeeper caretaker cartographer cashier cleaner clerk composer "
        "cooper dancer decorator designer diver drummer editor fireman forester geologist goldsmith grocer "
        "guard hatter historian hunter interpreter journalist judge juggler knitter mechanic midwife miner "
        "musician notary optometrist organist paramedic pharmacist photographer physicist plasterer poet "
        "porter producer publisher ranger reporter sailor sculptor secretary singer smith statistician "
        "stonemason surveyor tanner tiler tutor typist upholsterer usher weaver woodcutter "
        "zoologist|tram_driver piano_tuner",
        "language": "Dutch Malay Thai Polish Greek Arabic Swahili Danish Turkish Hindi Korean Finnish Latvian Maltese "
        "Icelandic Zulu Somali Bengali Marathi Telugu Khmer Lao Mongolian Georgian Armenian Persian Kurdish "
        "Albanian Slovenian Croatian Hungarian Romanian Catalan Galician Breton Welsh Irish Yoruba Hausa "
        "Quechua Tagalog Nepali English French German Spanish Italian Portuguese Swedish Faroese Estonian "
        "Lithuanian Slovak Ukrainian Bulgarian Serbian Macedonian Turkmen Uzbek Kazakh Kyrgyz Tajik Pashto "
        "Punjabi Gujarati Kannada Malayalam Sinhala Burmese Vietnamese Indonesian Javanese Maori Samoan "
        "Hawaiian Amharic Xhosa Afrikaans Esperanto Latin Scots Corsican Sardinian Occitan Flemish "
        "Luxembourgish Belarusian Mandarin Cantonese Tibetan Uyghur Navajo",
        "alias": "Red Ace Sparky Doc Flash Moose Buzz Ginger Shorty Duke Boots Pepper Bandit Cricket Dizzy Goose "
        "Jumbo Lefty Maverick Noodle Pickles Scout Tiger Wizard Arrow Biscuit Comet Dasher Ember Falcon "
        "Gizmo Hopper Icicle Jester Kipper Lucky Magpie Nimbus Otter Panda Quill Raven Smokey Turbo Velvet "
        "Widget Yoyo Ziggy|Big_T The_Owl Two_Shoes",
    },
    "validation": {
        "first": "Amira Bruno Celia Dmitri Esther Felix Gita Henrik Irene Jonas Katya Leon Nadia Oscar Paula Rafael "
        "Sofia Tomas Ursula Marek",
        "last": "Abara Bergman Castillo Dvorak Eriksen Fontana Gruber Horvat Ito Jansen Kaya Lemaire Mancini "
        "Nyberg|ter_Horst da_Costa O'Shea El-Sayed Vega-Luna",
        "city": "Bilbao Aarhus Rouen Linz Genoa Bruges Uppsala Cadiz Turku Vilnius York Galway|Le_Mans Sankt_Veit",
        "job": "roofer jeweler surgeon potter cobbler gardener waiter lawyer miller brewer|bus_driver book_binder",
        "language": "Czech Tamil Hebrew Norwegian Urdu Russian Japanese Basque",
        "alias": "Blue Captain Whiskers Chip Rocket Badger Fuzzy Sunny|Old_Tom The_Fox",
    },
}
RARE = 0.15  # share of words that are drawn from behind the bar, and of other unusual values

TENS = ("twenty", "thirty", "forty", "fifty", "sixty", "seventy")
ONES = ("", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")

# field -> wordings of what is said; {} is the value
SAID: dict[str, tuple[str, ...]] = {
    "age": ("is {} years old", "is {}", "turned {} this year"),
    "city": ("lives in {}", "has a flat in {}", "comes from {}"),
    "job": ("works as a {}", "is a {} by trade", "has a job as a {}"),
    "languages": ("speaks {}", "knows {}", "learned {} at school"),
    "member": ("is a member", "has joined the club"),
    "balance": ("has {} euros of credit", "is {} euros ahead"),
    "alias": ('goes by "{}"', 'is called "{}" by friends', 'signs as "{}"'),
}
NOT_MEMBER = ("is not a member", "has not joined the club")
OWES = ("owes {} euros", "is {} euros behind")
NO_LANGUAGE = ("speaks no foreign language", "knows no other language")

Record = dict[str, Any]  # field -> value, in the order in which they are said: nothing else would be learned so soon


def load() -> Task:
    """Make the task: the same rows in the same order on every machine."""
    train, validation = (_rows(split) for split in ROWS)
    notes = ("generated; validation shares no name, town, trade, language or nickname with train",)
    return build(NAME, None, METRICS, train, {"validation": validation}, notes, "causal", columns=("messages",))


def pairs(split: str) -> list[tuple[str, Record]]:
    """Return the descriptions of a split and the records that they say."""
    rng = Random(SEED + [*ROWS].index(split))  # only random() is used: every Python version promises its values
    made: dict[str, Record] = {}
    while len(made) < ROWS[split]:
        record, said = _record(WORDS[split], rng)
        made.setdefault(_sentence(record["name"], said, rng), record)
    return list(made.items())


def words(split: str, kind: str) -> list[str]:
    """Return the words of a kind that a split may use."""
    return [word.replace("_", " ") for word in WORDS[split][kind].replace("|", " ").split()]


def _rows(split: str) -> Split:
    chats = [
        (("user", QUESTION + text), ("assistant", json.dumps(record, ensure_ascii=False)))
        for text, record in pairs(split)
    ]
    return Split(chats, [None] * len(chats))


# ---- a record --------------------------------------------------------------------------------------------------------


def _record(kinds: dict[str, str], rng: Random) -> tuple[Record, list[str]]:
    """Return a record, and what is said of each of its fields but the name, in a drawn order."""
    record: Record = {"name": f"{_word(kinds['first'], rng)} {_word(kinds['last'], rng)}"}
    said = []
    for field in _some(list(MAKERS), FEWEST - 1 + int(rng.random() * (MOST - FEWEST + 1)), rng):
        record[field], text = MAKERS[field](kinds, rng)
        said.append(text)
    return record, said


def _word(kind: str, rng: Random) -> str:
    """Draw a word; one from behind the bar is rarer."""
    usual, _, rare = kind.partition("|")
    return str(_one((rare if rare and rng.random() < RARE else usual).split(), rng)).replace("_", " ")


def _age(kinds: dict[str, str], rng: Random) -> tuple[int, str]:
    age = 20 + int(rng.random() * 60)
    ones = f"-{ONES[age % 10]}" if age % 10 else ""
    shown = f"{TENS[age // 10 - 2]}{ones}" if rng.random() < RARE else str(age)
    return age, _one(SAID["age"], rng).format(shown)


def _drawn(field: str, kind: str) -> Callable[[dict[str, str], Random], tuple[str, str]]:
    def make(kinds: dict[str, str], rng: Random) -> tuple[str, str]:
        word = _word(kinds[kind], rng)
        return word, _one(SAID[field], rng).format(word)

    return make


def _languages(kinds: dict[str, str], rng: Random) -> tuple[list[str], str]:
    if rng.random() < RARE:
        return [], _one(NO_LANGUAGE, rng)
    names = _some(kinds["language"].split(), 1 + int(rng.random() * 3), rng)
    listed = " and ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)
    return names, _one(SAID["languages"], rng).format(listed)


def _member(kinds: dict[str, str], rng: Random) -> tuple[bool, str]:
    member = rng.random() < 0.6
    return member, _one(SAID["member"] if member else NOT_MEMBER, rng)


def _balance(kinds: dict[str, str], rng: Random) -> tuple[float, str]:
    """Draw whole euros, or some with cents, of credit or owed."""
    cents = int(rng.random() * 4) * 25 if rng.random() < 2 * RARE else 0
    euros = 1 + int(rng.random() * 200)
    shown = f"{euros}.{cents:02d}" if cents else str(euros)
    value = euros + cents / 100 if cents else euros
    owed = rng.random() < 0.4
    return -value if owed else value, _one(OWES if owed else SAID["balance"], rng).format(shown)


MAKERS: dict[str, Callable[[dict[str, str], Random], tuple[Any, str]]] = {
    "age": _age,
    "city": _drawn("city", "city"),
    "job": _drawn("job", "job"),
    "languages": _languages,
    "member": _member,
    "balance": _balance,
    "alias": _drawn("alias", "alias"),
}


# ---- its sentences ---------------------------------------------------------------------------------------------------


def _sentence(name: str, said: list[str], rng: Random) -> str:
    """Return one sentence, or two, that say everything."""
    cut = len(said) if rng.random() < 0.5 else 1 + int(rng.random() * (len(said) - 1))
    parts = [(name, said[:cut]), (_one(("This person", "The same person"), rng), said[cut:])]
    return " ".join(f"{who} {_joined(mine)}." for who, mine in parts if mine)


def _joined(parts: list[str]) -> str:
    return ", and ".join([", ".join(parts[:-1]), parts[-1]]) if len(parts) > 1 else parts[0]


def _one(items: Any, rng: Random) -> Any:
    return items[int(rng.random() * len(items))]


def _some(items: list[Any], count: int, rng: Random) -> list[Any]:
    """Draw some items in a drawn order."""
    left = list(items)
    return [left.pop(int(rng.random() * len(left))) for _ in range(count)]
