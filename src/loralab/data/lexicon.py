"""The words and sentence patterns of the embedded task: data only, read by `embedded.py`.

A word class is one string of rows; a row is the forms of one word, joined by "/". The classes of `WORDS` hold content
words, and each split has its own; `CLOSED` holds the function words, which both splits need.

A pattern is a sentence of slots. A slot is a literal word, or `class:form`, where form is a place in the row (`FORMS`)
or a feature (`FEATURES`), drawn once per sentence; `-n` is another value of feature n. A class alone is its first form.
`good|bad` is the one place where the two members of a pair differ (one side may be empty); it draws one row for both
sides if their class is the same. A final `?` makes a word optional. No row comes twice in one sentence.
"""

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
