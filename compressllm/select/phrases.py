"""Key phrases of texts, by RAKE."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Sequence
from typing import Final

# Words that separate phrases. English ones that carry grammar, and those by which instructions are given.
_STOP: Final = frozenset(
    re.findall(
        r"\S+",
        """
    a about above after again against all also although always am among an and another any anyone anything are aren't
    around as at away back be became because become been before being below best better between both but by came can
    can't cannot come could couldn't did didn't do does doesn't doing don't done down during each either else enough
    even ever every everyone everything few first following for from further get gets getting give given gives go goes
    going good got had has hasn't have haven't having he her here hers herself him himself his how however i i'd i'll
    i'm i've if in instead into is isn't it it's its itself just keep know known last least less let let's like likely
    list made make makes making many may maybe me mean means might more most much must my myself need needs neither
    never new next no nobody none nor not nothing now of off often old on once one only onto or other others our ours
    out over own part per perhaps please possible put rather read same say says see seem seems several shall she should
    shouldn't since so some someone something sometimes still such take takes taken tell than that that's the their
    theirs them themselves then there there's therefore these they they're thing things this those though three through
    thus to together too toward two under until up upon us use used using usually very want was wasn't way we well
    went were weren't what what's when where whether which while who whole whom whose why will with within without
    won't would wouldn't write written yes yet you you're your yours yourself answer question example passage sentence
    text word words paragraph explain describe find choose
    """,
    )
)
_PIECE: Final = re.compile(r"[^\W\d_][\w'’-]*|[.,;:!?()\[\]{}\"\n/|]|\S")
_LONGEST: Final = 3  # words in a phrase; longer ones are hardly ever met twice


def candidates(text: str) -> list[str]:
    """The runs of up to three words between stop words and punctuation, lower case, in order, each once."""
    found: dict[str, None] = {}
    run: list[str] = []
    for piece in [*_PIECE.findall(text.lower().replace("’", "'")), "."]:
        if piece[0].isalpha() and len(piece) > 2 and piece not in _STOP:
            run.append(piece.removesuffix("'s"))
            continue
        if 1 <= len(run) <= _LONGEST:
            found[" ".join(run)] = None
        run = []
    return list(found)


def key_phrases(found: Sequence[Sequence[str]], most: int = 6, generic: float = 0.01) -> list[list[str]]:
    """The best of each text's candidate phrases, best first.

    A word scores the number of words it stands beside, itself counted, by how often it stands, over all texts; a
    phrase the sum of its words. Left out is what only one text has, since it can agree or conflict with nothing, and
    what more than ``generic`` of all texts have, since it goes with anything.

    Args:
        found: What `candidates` gave for each text.
        most: Phrases of a text.

    Source: Rose et al., Automatic keyword extraction from individual documents, 2010.
    """
    texts_with = Counter(phrase for phrases in found for phrase in phrases)
    often: Counter[str] = Counter()
    beside: Counter[str] = Counter()
    for phrases in found:
        for words in map(str.split, phrases):
            often.update(words)
            beside.update(dict.fromkeys(words, len(words)))
    score = {phrase: sum(beside[word] / often[word] for word in phrase.split()) for phrase in texts_with}
    limit = max(2.0, generic * len(found))
    return [
        sorted((one for one in phrases if 2 <= texts_with[one] <= limit), key=lambda one: (-score[one], one))[:most]
        for phrases in found
    ]


def typical_phrases(found: Sequence[Sequence[str]], clusters: Sequence[int], most: int = 6) -> list[list[str]]:
    """For each cluster 0, 1, … the phrases that tell it from the others: common in it, and rarer elsewhere.

    Args:
        found: What `candidates` gave for each text.
        clusters: The cluster of each text.
    """
    texts_with = Counter(phrase for phrases in found for phrase in phrases)
    within = [Counter[str]() for _ in range(max(clusters) + 1)]
    for phrases, cluster in zip(found, clusters, strict=True):
        within[cluster].update(phrases)
    sizes = Counter(clusters)

    def tells(phrase: str, cluster: int) -> float:
        share = within[cluster][phrase] / sizes[cluster]
        return share * math.log(share * len(found) / texts_with[phrase])

    return [
        sorted((one for one, n in counts.items() if n > 1), key=lambda one: (-tells(one, cluster), one))[:most]
        for cluster, counts in enumerate(within)
    ]
