"""Which slots of a meaning a sentence names: rules for the eight slots of E2E NLG.

A meaning is a text such as `name[Cotto], area[riverside], familyFriendly[no]`. Names, kinds of
place and of food must stand in the sentence. For the other slots a pattern says which words count;
it must be the right value: `priceRange[high]` is not named by "high customer rating". The rules
were written beside training sentences, and people's sentences are the control: they leave out or
contradict some slots, too.
"""

import re
import unicodedata

SLOT = re.compile(r"\s*([^\[\],]+)\[([^\]]*)\]")

PRICE = r"(pric\w*|cost\w*|budget)"
RATING = r"(rat(ed|ing|ings|es?)|review\w*|star\w*|customers?)"
CHILD = r"(famil|kid|child)"
NO = r"(\bno\b|\bnot\b|n't\b|\bnon\b|\bnever\b|\bwithout\b|\bunsuitable\b)"

PATTERNS = {
    ("area", "riverside"): r"\briver",
    (
        "area",
        "city centre",
    ): r"\b(city|town)\W+cent(re|er)|cent(re|er) of (the )?(city|town)|downtown"
    r"|\bcent(re|er|ral)\b|\bin the city\b",
    ("priceRange", "cheap"): rf"\bcheap|inexpensive|affordable|low(er)?\W+(in )?{PRICE}"
    rf"|{PRICE}[^.]{{0,15}}\blow|less than|under",
    ("priceRange", "less than £20"): rf"\b20\b|twenty|\bcheap|inexpensive|low(er)?\W+{PRICE}",
    ("priceRange", "moderate"): r"moderate|\bmid\b|mid-|medium|reasonabl|average(ly)?\W+pric"
    rf"|{PRICE}[^.]{{0,20}}average",
    ("priceRange", "£20-25"): r"\b20\b.{0,12}25\b|moderate|twenty",
    ("priceRange", "high"): rf"\bhigh(er|ly)?\W+(end|{PRICE})|{PRICE}[^.]{{0,20}}\bhigh|expensive"
    rf"|\bpricey|above average\W+{PRICE}|\bhigher",
    ("priceRange", "more than £30"): rf"\b30\b|thirty|expensive|\bhigh(er|ly)?\W+(end|{PRICE})",
    ("customer rating", "low"): rf"\b(low|poor)(ly|er)?\b[^.]{{0,25}}{RATING}"
    rf"|{RATING}[^.]{{0,25}}\b(low|poor)|\b(1|one)\W+(out|star|of)|\bbad",
    (
        "customer rating",
        "1 out of 5",
    ): rf"\b(1|one)\W+(out|star|of)|\b1/5|{RATING}[^.]{{0,20}}\b(1|one)\b"
    rf"|\b(low|poor)(ly|er)?\b[^.]{{0,25}}{RATING}|{RATING}[^.]{{0,25}}\b(low|poor)",
    (
        "customer rating",
        "average",
    ): rf"\baverage\b[^.]{{0,25}}{RATING}|{RATING}[^.]{{0,25}}\baverage"
    rf"|\b(3|three)\W+(out|star|of)",
    (
        "customer rating",
        "3 out of 5",
    ): rf"\b(3|three)\W+(out|star|of)|\b3/5|{RATING}[^.]{{0,20}}\b(3|three)\b"
    rf"|\baverage\b[^.]{{0,25}}{RATING}|{RATING}[^.]{{0,25}}\baverage",
    (
        "customer rating",
        "high",
    ): rf"\b(high|good|great|excellent|well)(ly|er)?\b[^.]{{0,25}}{RATING}"
    rf"|{RATING}[^.]{{0,25}}\b(high|good|great|excellent)|\b(5|five)\W+(out|star|of)",
    (
        "customer rating",
        "5 out of 5",
    ): rf"\b(5|five)\W+(out|star|of)|\b5/5|{RATING}[^.]{{0,20}}\b(5|five)\b"
    rf"|\b(high|excellent|well|top|perfect)(ly|er)?\b[^.]{{0,25}}{RATING}|{RATING}[^.]{{0,25}}\bhigh",
    ("food", "English"): r"\benglish|\bbritish",
    ("eatType", "coffee shop"): r"coffee",
}
# said of children with a "no" close to it, or of adults
UNFRIENDLY = rf"{NO}[^.]{{0,40}}{CHILD}|{CHILD}[^.,]{{0,25}}({NO}|unfriendly|unwelcome)|\badult|{CHILD}\w*[- ]free"


def slots_of(meaning: str) -> list[tuple[str, str]]:
    """`name[Cotto], area[riverside]` -> its slots and their values."""
    return [(slot.strip(), value.strip()) for slot, value in SLOT.findall(meaning)]


def plain(text: str) -> str:
    """Lower case without accents."""
    letters = unicodedata.normalize("NFKD", text.lower())
    return "".join(letter for letter in letters if not unicodedata.combining(letter))


def names_slot(slot: str, value: str, sentence: str) -> bool:
    """Whether a sentence says that the slot has this value."""
    sentence = plain(sentence)
    if slot == "familyFriendly":
        is_unfriendly = re.search(UNFRIENDLY, sentence) is not None
        if value == "no":
            return is_unfriendly
        # "not for children" mentions children, too
        return re.search(CHILD, sentence) is not None and not is_unfriendly
    # names and kinds of food have no pattern: they must stand there as they are
    pattern = PATTERNS.get((slot, value), re.escape(plain(value)))
    return re.search(pattern, sentence) is not None


def slots_named(meanings: list[str], sentences: list[str]) -> float | None:
    """Share of the slots of all meanings that their sentences name; None if there are no slots."""
    hits = []
    for meaning, sentence in zip(meanings, sentences, strict=True):
        # over all slots, so that a meaning with many of them counts more
        hits += [names_slot(slot, value, sentence) for slot, value in slots_of(meaning)]
    return sum(hits) / len(hits) if hits else None
