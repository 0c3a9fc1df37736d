"""The words of a simulated world: categories with their nouns and tags, names of authors, cities and devices."""

from typing import Final


def _words(text: str, separator: str = " ") -> tuple[str, ...]:
    return tuple(text.split(separator))


DEVICES: Final = ("phone", "tablet", "desktop", "tv")
GENDERS: Final = ("female", "male", "other")
CITIES: Final = _words(
    "Alderhaven Brackwater Caldermouth Dunmere Eastfold Farrowgate Glimmerford Harrowick Ironbridge Jasperton "
    "Kestrelby Larkhollow Mossvale Northmoor Oakenshaw Pinecrest Quarrydale Ravensport Silverton Thornbury"
)
CATEGORIES: Final = {
    "astronomy": (
        "comet telescope orbit nebula eclipse starmap planet observatory",
        "planets telescopes galaxies moon rockets sky-charts meteors physics",
    ),
    "baking": (
        "loaf pastry oven dough tart biscuit sourdough crumb",
        "bread cakes sourdough chocolate pies gluten-free yeast icing",
    ),
    "chess": (
        "gambit endgame rook tournament opening bishop checkmate pawn",
        "openings endgames tactics blitz puzzles grandmasters strategy history-of-chess",
    ),
    "cinema": (
        "scene director camera script matinee trailer premiere reel",
        "drama comedy documentary animation noir directors soundtracks short-films",
    ),
    "cycling": (
        "saddle climb peloton gravel sprocket descent wheel commute",
        "road gravel mountain commuting bike-repair touring racing e-bikes",
    ),
    "football": (
        "derby striker penalty keeper transfer league corner kickoff",
        "league cup goals transfers training youth women referees",
    ),
    "gardening": (
        "orchard seedling compost hedge greenhouse tulip pruning meadow",
        "vegetables roses compost balcony trees herbs lawns bees",
    ),
    "history": (
        "empire archive castle treaty harbour chronicle market voyage",
        "medieval antiquity explorers castles letters trade maps museums",
    ),
    "music": (
        "melody chorus guitar encore rhythm vinyl concert piano",
        "jazz folk classical electronic guitar piano live singing",
    ),
    "savings": (
        "budget ledger pension mortgage dividend receipt coin loan",
        "budgets pensions funds housing taxes insurance side-jobs banking",
    ),
    "travel": (
        "harbour railway island hostel border passport lagoon road",
        "islands trains mountains cities hostels food packing photography",
    ),
    "woodwork": (
        "chisel bench joint plank lathe cabinet varnish saw",
        "joinery carving tools furniture oak finishing turning toys",
    ),
}
"""For each category the nouns of its titles, and its tags."""
SHARED_TAGS: Final = _words("beginner expert budget weekend family quick classic")
ADJECTIVES: Final = _words(
    "quiet golden first forgotten patient hidden crooked honest late bright stubborn little northern slow borrowed "
    "winding humble curious silver early wandering second simple restless"
)
ENDINGS: Final = _words(
    "at dawn|by the river|in winter|for two|after the rain|without hurry|on a small table|in ten steps|under the hill|"
    "from memory|of the north|against the clock",
    "|",
)
FIRST_NAMES: Final = _words("Ada Bruno Clara Dimo Elin Faro Greta Hugo Iris Jonas Kaja Levi Mira Nilo Orla Pavel")
LAST_NAMES: Final = _words(
    "Ashgrove Birchley Coldwell Dovetail Elmhurst Fennick Gorsedale Hartwood Inglemoor Juniper Kettlewell Lindqvale "
    "Marlowe Netherby Osmund Pennyfold Quillon Rookwood Stillwater Tamsin Underhay Vanebrook Wexcombe Yarrow"
)


def author_name(row: int) -> str:
    """A name for each author; a numeral tells namesakes apart.

    >>> author_name(0), author_name(1), author_name(384)
    ('Ada Ashgrove', 'Bruno Ashgrove', 'Ada Ashgrove 2')
    """
    generation, name = divmod(row, len(FIRST_NAMES) * len(LAST_NAMES))
    last, first = divmod(name, len(FIRST_NAMES))
    return f"{FIRST_NAMES[first]} {LAST_NAMES[last]}" + (f" {generation + 1}" if generation else "")
