"""Write configs/data/letters/: reverse 3 to 6 different letters out of ten. Train and test share no string.

Seeded: run from the repository's root, it writes the same files every time.

    python scripts/make_letters_data.py
"""

import json
import random
import sys
from pathlib import Path

TARGET = Path(__file__).resolve().parents[1] / "configs" / "data" / "letters"
LETTERS = "abcdefghij"
SEED = 20240601
# rows of each length; there are only 720 strings of 3 different letters
COUNTS = {
    "test": {3: 80, 4: 140, 5: 140, 6: 140},
    "train_sft": {3: 220, 4: 1260, 5: 1260, 6: 1260},
    "train_rl": {3: 150, 4: 750, 5: 1650, 6: 2250},  # mostly what SFT leaves unlearned
}


def draw(generator: random.Random, length: int, count: int, taken: set[str]) -> list[str]:
    """Draw `count` strings of `length` different letters that are not in `taken`, which grows by them."""
    strings: list[str] = []
    while len(strings) < count:
        text = "".join(generator.sample(LETTERS, length))
        if text not in taken:
            taken.add(text)
            strings.append(text)
    return strings


def main() -> int:
    TARGET.mkdir(parents=True, exist_ok=True)
    generator = random.Random(SEED)
    taken: set[str] = set()
    for name, counts in COUNTS.items():
        strings = [
            text
            for length, count in counts.items()
            for text in draw(generator, length, count, taken)
        ]
        generator.shuffle(strings)
        lines = [json.dumps({"question": text, "answer": text[::-1]}) + "\n" for text in strings]
        (TARGET / f"{name}.jsonl").write_text("".join(lines))
        print(f"wrote {TARGET / name}.jsonl: {len(lines)} rows")
    return 0


if __name__ == "__main__":
    sys.exit(main())
