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
ROWS = {"train": 3000, "validation": 200}
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
        "Tara Viktor Wanda Yusuf Zoe Anton Bella Carlos Dora Emil Fatima Georg Hanna Ivan Julia Kamil Lucia Mateo "
        "Noor Otto Petra Qasim Rita Stefan Tove Ulrich Vera Willem Xenia Ylva Zita Agnes Bjorn Clara Denis Elena "
        "Frida Goran Heidi Igor Jana Karl Aaron Abel Adam Adele Adrian Agatha Aidan Albert Alan Alice Alma Alfred "
        "Amanda Ambrose Amos Amy Andrea Andrew Angela Anita Anna Annika Antonio Arthur Astrid Aurora Axel Barbara "
        "Beatrice Benjamin Bernard Bertha Bianca Bridget Brian Bryan Calvin Camille Carmen Caroline Catherine Cecil "
        "Charles Charlotte Christina Christopher Claire Claude Colin Connor Constance Cora Craig Curtis Cynthia "
        "Daisy Daphne Darius David Deborah Declan Delia Derek Diana Diego Dominic Donald Dorothy Dylan Edgar Edith "
        "Edmund Edward Edwin Eileen Eleanor Eliza Ella Elliot Elsa Emily Emma Enrique Eric Erica Ernest Eva Evelyn "
        "Fabian Faith Fernando Fiona Flora Florian Francesca Francis Frank Frederick Gabriel Gary Gemma Gerald "
        "Gilbert Giovanni Gloria Gordon Grace Gregory Guido Gustav Gwen Hamish Hannah Harold Harriet Harry Hazel "
        "Helen Henry Herbert Hilda Holly Hope Howard Iris Isaac Isabel Ismael Jack Jacob James Jane Jason Jasmine "
        "Jeremy Jerome Jessica Joan Joel John Jonathan Jordan Joseph Joshua Joyce Juan Judith Julian Karen Kate "
        "Keith Kenneth Kevin Kim Laura Laurence Lena Leonard Leo Lewis Liam Lily Linda Lisa Logan Lorenzo Louis "
        "Louise Lucas Luis Luke Luna Lydia Mabel Magnus Malcolm Marcel Marco Marcus Margaret Maria Marie Marina "
        "Mario Mark Martha Martin Mary Mason Matilda Matthew Maurice Max Maya Megan Melissa Michael Miguel Miles "
        "Milo Miriam Mohammed Molly Monica Morgan Muriel Myra Nancy Naomi Nathan Neil Nicholas Nicole Nigel Nina "
        "Noah Nora Norman Olive Oliver Omar Oona Oswald Owen Pablo Patricia Patrick Paul Pauline Pearl Penelope "
        "Percy Peter Philip Phoebe Pierre Priya Quentin Rachel Ralph Ramon Ravi Raymond Rebecca Ricardo Richard "
        "Robert Robin Roger Roland Ronald Rory Rosalind Roy Ruben Ruby Rudolf Rupert Ruth Ryan Sabrina Salma Samuel "
        "Sandra Sarah Scott Sean Sebastian Selma Serena Sergio Sharon Sidney Silvia Simon Sonia Stella Stephen "
        "Steven Susan Sven Sylvia Tanya Teresa Theodore Theresa Thomas Timothy Tobias Tony Trevor Uma Valentina "
        "Valerie Vanessa Victor Victoria Vincent Violet Virginia Vivian Walter Warren Wendy Wilfred William Winston "
        "Yolanda Yvonne Zachary Zelda",
        "last": "Okafor Lindqvist Moreno Novak Tanaka Haddad Keller Rossi Silva Dubois Larsen Petrov Nagy Costa "
        "Weber Yilmaz Fischer Kowalski Andersson Brandt Conti Dvali Esposito Ferrari Gomez Hansen Ivanov Jensen "
        "Kovacs Lopez Marini Nilsen Olsen Popov Quist Romero Schmidt Torres Urban Virtanen Wagner Zeman O'Brien "
        "Ruiz-Soler Adams Ahmed Aldridge Allen Alvarez Armstrong Atkinson Bailey Baker Banerjee Barnes Bauer Beck "
        "Becker Bennett Bernard Black Blake Bond Booth Bradley Brooks Brown Bryant Burke Burns Butler Byrne Campbell "
        "Carter Castro Chan Chandra Chapman Chen Clark Cohen Cole Collins Cooper Crawford Cross Cruz Cunningham "
        "Curtis Dalton Daniels Davies Davis Dawson Dean Diaz Dixon Douglas Doyle Duncan Dunn Edwards Elliott Ellis "
        "Evans Farrell Ferguson Fernandez Fisher Fleming Fletcher Flynn Ford Foster Fox Francis Franklin Fraser "
        "Freeman Fuller Garcia Gardner Gibson Gilbert Gonzalez Goodman Gordon Graham Grant Gray Green Greene Griffin "
        "Gupta Hall Hamilton Harper Harris Harrison Hart Harvey Hawkins Hayes Henderson Henry Hernandez Hill Hoffman "
        "Holland Holmes Howard Hudson Hughes Hunt Hunter Hussain Jackson Jacobs James Jenkins Johnson Johnston Jones "
        "Jordan Kelly Kennedy Khan Kim King Knight Kumar Lambert Lane Lawrence Lawson Lee Lewis Lloyd Logan Long "
        "Lynch MacDonald Malone Marshall Martin Martinez Mason Matthews McCarthy McDonald McKenzie Medina Mehta "
        "Mendoza Meyer Mitchell Morgan Morris Morrison Mueller Murphy Murray Myers Nelson Newman Newton Nguyen "
        "Nichols Norris Olsson Ortiz Owens Palmer Park Parker Patel Patterson Payne Pearce Perez Perkins Perry "
        "Peterson Phillips Pierce Pope Porter Powell Price Ramirez Ramos Reed Reid Reyes Reynolds Richards "
        "Richardson Riley Rivera Roberts Robertson Robinson Rodriguez Rogers Rose Ross Russell Ryan Sanchez Sanders "
        "Santos Schneider Scott Shah Sharma Shaw Simmons Simpson Singh Smith Snyder Sokolov Spencer Stevens Stewart "
        "Stone Sullivan Suzuki Tanner Taylor Thomas Thompson Tucker Turner Vargas Vaughan Walker Wallace Walsh Wang "
        "Ward Warren Washington Watkins Watson Watts Webb Wells West Wheeler White Wilkinson Williams Wilson Wolf "
        "Wong Wood Woods Wright Yang Yamada Young Zimmerman|van_der_Berg de_la_Cruz Al-Amin D'Angelo Mac_Neill "
        "Saint-Clair",
        "city": "Porto Oslo Lyon Graz Turin Ghent Malmo Seville Tampere Riga Leeds Cork Basel Split Zadar Utrecht "
        "Bergen Nantes Toulouse Bologna Krakow Gdansk Leipzig Kassel Toledo Murcia Faro Odense Espoo Tartu Kaunas "
        "Dundee Derry Namur Trento Varna Pecs Kosice Ostrava Maribor Antwerp Brno Coimbra Dresden Essen Florence "
        "Geneva Halle Innsbruck Jerez Kiel Lugano Modena Namsos Oviedo Palermo Rostock Siena Trieste Udine Verona "
        "Wroclaw Zagreb Aalborg Bremen Delft Fulda Huelva Imola Lahti Aberdeen Accra Adelaide Alexandria Algiers "
        "Amman Amsterdam Ankara Arnhem Athens Atlanta Auckland Austin Avignon Baghdad Baltimore Bangkok Barcelona "
        "Bari Bath Beijing Beirut Belfast Belgrade Berlin Bern Birmingham Bogota Bonn Bordeaux Boston Bradford "
        "Brighton Brisbane Bristol Brussels Bucharest Budapest Buenos_Aires Buffalo Burgos Cairo Calais Calgary "
        "Cambridge Canberra Canterbury Cape_Town Caracas Cardiff Carlisle Casablanca Catania Charleston Chennai "
        "Chester Chicago Cleveland Cologne Colombo Copenhagen Cordoba Coventry Dakar Dallas Damascus Darwin Delhi "
        "Denver Derby Detroit Dijon Doha Dortmund Dover Dubai Dublin Dubrovnik Durban Durham Edinburgh Exeter Faenza "
        "Frankfurt Freiburg Fukuoka Galveston Gibraltar Glasgow Gloucester Granada Grenoble Hague Halifax Hamburg "
        "Hamilton Hanoi Hanover Harare Havana Heidelberg Helsinki Hobart Houston Hull Ipswich Istanbul Izmir Jakarta "
        "Jerusalem Kabul Kampala Kansas Karachi Kathmandu Kent Kiev Kingston Kobe Kyoto Lagos Lahore Lancaster "
        "Lausanne Lexington Lille Lima Limerick Lincoln Lisbon Liverpool Ljubljana London Louisville Lucerne Madrid "
        "Mainz Manchester Manila Mannheim Marseille Melbourne Memphis Metz Miami Milan Minsk Mombasa Montreal Moscow "
        "Mumbai Munich Naples Nashville Newark Newcastle Newport Nice Norwich Nottingham Nuremberg Odessa Omaha "
        "Orleans Osaka Ottawa Oxford Padua Paris Parma Perth Perugia Philadelphia Phoenix Pisa Pittsburgh Plymouth "
        "Portland Portsmouth Prague Pretoria Providence Quebec Quito Ravenna Reading Regina Rennes Reykjavik "
        "Richmond Rome Rotterdam Sacramento Salerno Salisbury Salzburg Santiago Sarajevo Savannah Seattle Seoul "
        "Shanghai Sheffield Singapore Southampton Stavanger Stirling Stockholm Strasbourg Stuttgart Sunderland "
        "Swansea Sydney Tallinn Tampa Tangier Tbilisi Tehran Tokyo Toronto Tripoli Tromso Tunis Valencia Valletta "
        "Vancouver Venice Versailles Vienna Vigo Warsaw Washington Wellington Winchester Windsor Winnipeg Worcester "
        "Yerevan Zaragoza Zurich|Den_Helder San_Marino Bad_Ischl",
        "job": "glazier baker nurse plumber tailor pilot welder dentist florist barber teacher mason farmer printer "
        "carpenter butcher chemist courier cook translator optician engineer librarian shepherd locksmith painter "
        "electrician vet fisher saddler actor archivist architect auditor banker beekeeper biologist blacksmith "
        "bookkeeper caretaker cartographer cashier cleaner clerk composer cooper dancer decorator designer diver "
        "drummer editor fireman forester geologist goldsmith grocer guard hatter historian hunter interpreter "
        "journalist judge juggler knitter mechanic midwife miner musician notary optometrist organist paramedic "
        "pharmacist photographer physicist plasterer poet porter producer publisher ranger reporter sailor sculptor "
        "secretary singer smith statistician stonemason surveyor tanner tiler tutor typist upholsterer usher weaver "
        "woodcutter zoologist accountant acrobat actress administrator admiral advocate agent agronomist "
        "anthropologist apprentice archaeologist artist assistant astronaut astronomer athlete attorney author "
        "balloonist bellboy bishop boatman bodyguard botanist bouncer boxer brakeman bricklayer broker bursar "
        "cabinetmaker candlemaker cardiologist chancellor chauffeur chef chaplain chiropractor choreographer "
        "clockmaker clown coach coachman colonel columnist comedian commander commentator commissioner conductor "
        "consultant contractor coroner correspondent counselor craftsman critic croupier curator cyclist dairyman "
        "dealer deacon dermatologist detective developer dietitian diplomat director dispatcher doctor dogwalker "
        "dramatist dressmaker driver economist educator embroiderer engraver entertainer entrepreneur estimator "
        "executive explorer exterminator farrier ferryman fiddler filmmaker financier firefighter fishmonger "
        "flautist foreman fundraiser furrier gamekeeper geographer glassblower governor groom guitarist gunsmith "
        "gymnast harpist headmaster herbalist horticulturist housekeeper illusionist illustrator importer innkeeper "
        "inspector instructor inventor investigator investor janitor jockey joiner juror laborer landlord lecturer "
        "lieutenant lifeguard lithographer lobbyist logger lumberjack lyricist machinist magician magistrate maid "
        "manager marine mariner marketer mathematician mayor mediator merchant messenger meteorologist milkman "
        "minister missionary model monk narrator navigator neurologist novelist nun nutritionist officer operator "
        "orderly pathologist pastor pediatrician performer philosopher pharmacologist pianist playwright podiatrist "
        "policeman politician postman preacher priest principal professor programmer promoter psychiatrist "
        "psychologist puppeteer quarryman rabbi radiologist rancher realtor receptionist recruiter referee registrar "
        "researcher restorer rigger rower sawyer scholar scientist scribe sculptress seamstress seller senator "
        "sergeant servant sheriff shipwright shoemaker shopkeeper silversmith skipper sociologist soldier soloist "
        "soprano specialist spokesman steward stockbroker strategist student stylist superintendent supervisor "
        "swimmer tattooist technician technologist telegraphist theologian therapist toolmaker trader trainer "
        "trapper treasurer umpire undertaker valet veterinarian vicar violinist vintner volunteer warden watchmaker "
        "whaler wheelwright winemaker worker wrestler writer|tram_driver piano_tuner",
        "language": "Dutch Malay Thai Polish Greek Arabic Swahili Danish Turkish Hindi Korean Finnish Latvian "
        "Maltese Icelandic Zulu Somali Bengali Marathi Telugu Khmer Lao Mongolian Georgian Armenian Persian Kurdish "
        "Albanian Slovenian Croatian Hungarian Romanian Catalan Galician Breton Welsh Irish Yoruba Hausa Quechua "
        "Tagalog Nepali English French German Spanish Italian Portuguese Swedish Faroese Estonian Lithuanian Slovak "
        "Ukrainian Bulgarian Serbian Macedonian Turkmen Uzbek Kazakh Kyrgyz Tajik Pashto Punjabi Gujarati Kannada "
        "Malayalam Sinhala Burmese Vietnamese Indonesian Javanese Maori Samoan Hawaiian Amharic Xhosa Afrikaans "
        "Esperanto Latin Scots Corsican Sardinian Occitan Flemish Luxembourgish Belarusian Mandarin Cantonese "
        "Tibetan Uyghur Navajo Abkhaz Acehnese Afar Akan Aleut Aramaic Assamese Avestan Aymara Azerbaijani Balinese "
        "Bambara Bashkir Bemba Bhojpuri Bislama Bosnian Buryat Cebuano Chamorro Chechen Cherokee Chewa Chinese "
        "Choctaw Chuvash Coptic Cornish Cree Creole Crimean Dari Dinka Dogri Dzongkha Edo Elamite Etruscan Evenki "
        "Ewe Fang Fijian Filipino Fon Frisian Friulian Fula Gaelic Ganda Gothic Greenlandic Guarani Haitian Herero "
        "Hiligaynon Hittite Hmong Hopi Igbo Ilocano Inuit Inuktitut Kabyle Kalmyk Kanuri Karelian Kashmiri Kashubian "
        "Kikuyu Kinyarwanda Komi Kongo Konkani Kurmanji Ladin Lakota Ligurian Lingala Livonian Lombard Luo "
        "Lushootseed Madurese Maithili Malagasy Manx Mapuche Marshallese Maya Minangkabau Mohawk Moksha Montenegrin "
        "Nahuatl Nauruan Ndebele Neapolitan Newar Nogai Norse Nuer Ojibwe Oriya Oromo Ossetian Palauan Pali "
        "Papiamento Phoenician Piedmontese Pijin Prussian Romani Romansh Rundi Sami Sango Sanskrit Santali Saxon "
        "Shona Sicilian Sindhi Sioux Sorbian Sotho Sumerian Sundanese Swazi Syriac Tahitian Tatar Tigrinya Tonga "
        "Tongan Tsonga Tswana Tuvan Udmurt Umbundu Venda Venetian Votic Walloon Waray Wolof Yakut Yiddish Zapotec "
        "Zazaki",
        "alias": "Red Ace Sparky Doc Flash Moose Buzz Ginger Shorty Duke Boots Pepper Bandit Cricket Dizzy Goose "
        "Jumbo Lefty Maverick Noodle Pickles Scout Tiger Wizard Arrow Biscuit Comet Dasher Ember Falcon Gizmo Hopper "
        "Icicle Jester Kipper Lucky Magpie Nimbus Otter Panda Quill Raven Smokey Turbo Velvet Widget Yoyo Ziggy "
        "Acorn Admiral Almond Amber Anchor Angel Ant Apple Apricot Archer Ash Aspen Atlas Bagel Bamboo Banjo Barley "
        "Baron Basil Basket Bear Beaver Bee Bell Berry Birch Bishop Blaze Blossom Bobcat Bolt Bonsai Bramble Brandy "
        "Brick Bridge Bronze Brook Bubble Buckle Buffalo Bullet Bumble Butter Button Cabbage Cactus Camel Candle "
        "Candy Canyon Caramel Cardinal Carrot Cashew Castle Cedar Champ Charcoal Cheese Cherry Chestnut Chief "
        "Cinnamon Clover Cobalt Cocoa Coconut Coffee Condor Cookie Copper Coral Corn Cosmic Cotton Cougar Cowboy "
        "Coyote Crane Crow Crown Crystal Cupcake Curly Cypress Daffodil Daisy Dancer Dawn Desert Diamond Dingo "
        "Dolphin Domino Donkey Dove Dragon Dragonfly Dreamer Drummer Duck Dusty Eagle Echo Eclipse Elbow Elephant "
        "Elf Elk Emerald Emperor Engine Feather Fern Ferret Fiddle Finch Fire Firefly Flame Flamingo Flint Flower "
        "Forest Frost Fudge Galaxy Garlic Gazelle General Genie Giant Giraffe Glacier Goblin Golden Gorilla Granite "
        "Grape Grasshopper Gravel Griffin Grizzly Gull Hammer Hamster Harbor Hare Harvest Hawk Hazelnut Hedgehog "
        "Heron Hickory Honey Hornet Horse Hurricane Iguana Indigo Iron Ivory Ivy Jackal Jade Jaguar Jasper Jelly Jet "
        "Jewel Jungle Juniper Kangaroo Kestrel King Kite Kitten Kiwi Knight Koala Ladybug Lantern Lark Lavender Leaf "
        "Legend Lemon Leopard Lettuce Lightning Lilac Lime Lion Lizard Lobster Locket Lotus Lynx Magma Magnet Mango "
        "Maple Marble Marigold Marmot Marshmallow Meadow Melon Mercury Midnight Mint Mischief Mole Mongoose Monkey "
        "Moon Moss Moth Mountain Mouse Muffin Mushroom Mustang Mustard Nacho Nectar Needle Nickel Nightingale Ninja "
        "Nugget Nutmeg Oak Oasis Ocean Olive Onion Onyx Opal Orange Orbit Orchid Osprey Owl Oyster Palm Pancake "
        "Panther Parrot Patches Peach Peacock Peanut Pebble Pelican Penguin Penny Peppermint Phantom Pigeon Pine "
        "Pineapple Pirate Pistachio Pixel Pixie Planet Plum Poet Pony Popcorn Poppy Porcupine Potato Prince "
        "Professor Puffin Puma Pumpkin Puppy Puzzle Python Quail Quartz Rabbit Raccoon Radish Rain Rainbow Raisin "
        "Rascal Rebel Reindeer Rhubarb River Robin Rogue Rooster Rose Ruby Rusty Saber Saffron Sage Salmon Salt "
        "Sandy Sapphire Scarlet Scorpion Seal Shadow Shark Sheep Silver Sky Slate Slim Snail Snow Snowball Socks "
        "Soldier Spark Sparrow Spider Spike Spinach Spirit Sprout Squirrel Stallion Star Stone Stork Storm Sugar "
        "Sunflower Swan Swift Sword Tadpole Talon Tango Teapot Thistle Thunder Toast Toffee Tomato Topaz Tornado "
        "Tortoise Toucan Tractor Trooper Trout Truffle Trumpet Tulip Turkey Turnip Turtle Twister Umbrella Valley "
        "Vanilla Viper Volcano Wagon Walnut Walrus Weasel Whale Wheat Whisper Willow Winter Wolf Wolverine Wombat "
        "Wren Yak Zebra Zephyr Zigzag|Big_T The_Owl Two_Shoes",
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
