"""Small tasks with one right answer, made from a seed: what a small model can do, and sparsity can break."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerBase

from compressllm.contextual.attach import Contextual
from compressllm.contextual.fidelity import Texts, generate_all
from compressllm.core.protocols import Corrector
from compressllm.models.prompting import encode_prompt

# fmt: off
_WORDS = (
    "river", "stone", "window", "garden", "yellow", "winter", "silver", "mountain", "paper", "market", "bridge",
    "candle", "ocean", "forest", "summer", "basket", "letter", "kitchen", "orange", "pencil", "village", "rabbit",
)
# fmt: on
_SHOTS = 6  # worked examples before a question
_NAMES = ("Anna", "Ben", "Clara", "David", "Emma", "Frank", "Grace", "Henry")


@dataclass(frozen=True)
class Item:
    """One question.

    Args:
        probe: Which task it is of.
        prompt: Worked examples, and the question.
        answer: What is right.
        limit: Most tokens to add.
    """

    probe: str
    prompt: str
    answer: str
    limit: int


def make_items(count: int, seed: int = 0) -> list[Item]:
    """So many questions of every probe; the same for the same seed."""
    return [item for probe, make in PROBES.items() for item in _items(probe, make, count, seed)]


def is_right(item: Item, text: str) -> bool:
    """Whether the first line of an answer is the right one, or of a worked answer ends in it."""
    line = text.split("\n", 1)[0].strip().strip('"').strip()
    return line.split(" = ")[-1].rstrip(".") == item.answer if item.probe == "word problem" else line == item.answer


@dataclass(frozen=True)
class Answers:
    """What a model answered.

    Args:
        right: Probe -> whether each item was answered rightly.
        texts: What was generated.
    """

    right: dict[str, list[bool]]
    texts: Texts

    def accuracy(self) -> dict[str, float]:
        """Of each probe, and ``all``, over all items."""
        everything = [one for answers in self.right.values() for one in answers]
        each = {probe: sum(answers) / len(answers) for probe, answers in self.right.items()}
        return {**each, "all": sum(everything) / len(everything)}


def answer_items(
    contextual: Contextual, tokenizer: PreTrainedTokenizerBase, items: Sequence[Item], corrector: Corrector | None
) -> Answers:
    """Answer every item greedily, each to the end of its line."""
    ends = frozenset(at for at in (tokenizer.eos_token_id, *_line_ends(tokenizer)) if at is not None)
    prompts = [encode_prompt(tokenizer, item.prompt).to(contextual.model.device) for item in items]
    texts = generate_all(contextual, prompts, [item.limit for item in items], corrector, ends)
    right: dict[str, list[bool]] = {}
    for item, made in zip(items, texts.tokens, strict=True):
        text = str(tokenizer.decode(made, skip_special_tokens=True))
        right.setdefault(item.probe, []).append(is_right(item, text))
    return Answers(right, texts)


def recovery(dense: float, sparse: float, corrected: float) -> float | None:
    """The share of what was lost that came back; None if nothing was lost."""
    return (corrected - sparse) / (dense - sparse) if dense > sparse else None


def right_of(answers: Answers) -> list[float]:
    """1 or 0 of every item, probe by probe."""
    return [float(one) for answers_of in answers.right.values() for one in answers_of]


def _items(probe: str, make: Callable[[random.Random], tuple[str, str, int]], count: int, seed: int) -> list[Item]:
    chance = random.Random(f"{probe} {seed}")
    made = []
    for _ in range(count):
        shots = [make(chance) for _ in range(_SHOTS)]
        question, answer, limit = make(chance)
        while any(question == shot[0] for shot in shots):
            question, answer, limit = make(chance)
        examples = "\n".join(f"{asked} {answered}" for asked, answered, _ in shots)
        made.append(Item(probe, f"{examples}\n{question}", answer.rsplit(" = ", 1)[-1].strip('"'), limit))
    return made


def _line_ends(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    ids = tokenizer("\n", add_special_tokens=False).input_ids
    return list(ids) if len(ids) == 1 else []


def _sum(chance: random.Random) -> tuple[str, str, int]:
    a, b = chance.randint(1, 9), chance.randint(1, 9)
    return f"{a} + {b} =", str(a + b), 4


def _difference(chance: random.Random) -> tuple[str, str, int]:
    a, b = sorted((chance.randint(1, 9), chance.randint(1, 9)), reverse=True)
    return f"{a} - {b} =", str(a - b), 4


def _copy(chance: random.Random) -> tuple[str, str, int]:
    words = " ".join(chance.sample(_WORDS, 5))
    return f'Text: "{words}"\nCopy:', f'"{words}"', 24


def _continue(chance: random.Random) -> tuple[str, str, int]:
    first, step = chance.randint(1, 20), chance.choice((1, 2, 5, 10))
    numbers = [first + step * at for at in range(7)]
    return f"{', '.join(map(str, numbers[:4]))} ->", ", ".join(map(str, numbers[4:])), 16


def _lookup(chance: random.Random) -> tuple[str, str, int]:
    names, things = chance.sample(_NAMES, 4), chance.sample(_WORDS, 4)
    at = chance.randrange(4)
    table = "; ".join(f"{name} has a {thing}" for name, thing in zip(names, things, strict=True))
    return f"{table}. {names[at]} has a", things[at], 6


def _reverse(chance: random.Random) -> tuple[str, str, int]:
    words = chance.sample(_WORDS, 3)
    return f"Reverse: {' '.join(words)} ->", " ".join(reversed(words)), 12


def _word_problem(chance: random.Random) -> tuple[str, str, int]:
    """Two steps, the answer worked out, as in GSM8K."""
    name, thing = chance.choice(_NAMES), chance.choice(("apples", "books", "coins", "eggs"))
    a, b = chance.randint(2, 9), chance.randint(1, 9)
    c = chance.randint(1, a + b - 1)
    question = f"Q: {name} has {a} {thing}, gets {b} more and gives away {c}. How many {thing} are left? A:"
    return question, f"{a} + {b} = {a + b}, {a + b} - {c} = {a + b - c}", 32


#: Task -> a question, its answer and the most tokens of one, drawn at random.
PROBES: dict[str, Callable[[random.Random], tuple[str, str, int]]] = {
    "sum": _sum,
    "difference": _difference,
    "copy": _copy,
    "continue": _continue,
    "lookup": _lookup,
    "reverse": _reverse,
    "word problem": _word_problem,
}


def probe_facts(answers: Answers) -> dict[str, Any]:
    """For the manifest."""
    return {"accuracy": answers.accuracy(), "items": len(right_of(answers)), **answers.texts.facts()}
