"""Writes train.jsonl, test.jsonl and demos.jsonl beside this file: sums of two numbers from 1 to 20, in words.

A fifth of the problems is held out; a + b and b + a are one problem. The demonstrations are of 100 training prompts.
"""

import json
import random
from itertools import combinations_with_replacement
from pathlib import Path

HERE = Path(__file__).parent
SYSTEM = {"role": "system", "content": "Answer with a number only."}
LARGEST, HELD_OUT, DEMONSTRATIONS = 20, 0.2, 100


def row(a: int, b: int) -> dict:
    """The row of a prompt."""
    return {"messages": [SYSTEM, {"role": "user", "content": f"What is {a} plus {b}?"}], "answer": a + b}


def write(name: str, rows: list[dict]) -> None:
    (HERE / name).write_text("".join(json.dumps(row) + "\n" for row in rows))


def main() -> None:
    rng = random.Random(0)
    problems = list(combinations_with_replacement(range(1, LARGEST + 1), 2))
    rng.shuffle(problems)
    held_out = round(HELD_OUT * len(problems))
    test, train = (
        rng.sample(pairs, len(pairs))
        for pairs in (
            sorted({pair for a, b in part for pair in ((a, b), (b, a))})
            for part in (problems[:held_out], problems[held_out:])
        )
    )
    write("train.jsonl", [row(*pair) for pair in train])
    write("test.jsonl", [row(*pair) for pair in test])
    demos = [row(*pair) for pair in train[:DEMONSTRATIONS]]
    write("demos.jsonl", [{**demo, "completion": str(demo["answer"])} for demo in demos])


if __name__ == "__main__":
    main()
