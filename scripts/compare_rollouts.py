"""How many requests of two rollouts are token for token the same, and where the others part.

    python scripts/compare_rollouts.py RUN_A/0-seer/samples.jsonl RUN_B/0-seer/samples.jsonl

The last line is one JSON object.
"""

import argparse
import json
from pathlib import Path


def main() -> None:
    """Compare and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("files", nargs=2, type=Path, help="samples.jsonl of two rollouts")
    first, second = (read_samples(file) for file in parser.parse_args().files)
    if first.keys() != second.keys():
        raise SystemExit("the two rollouts are not of the same requests")
    partings = [
        next((i for i, (a, b) in enumerate(zip(first[key], second[key], strict=False)) if a != b), None)
        for key in first
        if first[key] != second[key]
    ]
    num_tokens = sum(len(tokens) for tokens in first.values())
    print(
        json.dumps(
            {
                "num_requests": len(first),
                "num_identical": len(first) - len(partings),
                "generated_tokens": num_tokens,
                "first_differences_at": partings,
            }
        )
    )


def read_samples(file: Path) -> dict[tuple[int, int], list[int]]:
    """Token ids of every request."""
    lines = (json.loads(line) for line in file.read_text(encoding="utf-8").splitlines())
    return {(line["group_id"], line["index"]): line["token_ids"] for line in lines}


if __name__ == "__main__":
    main()
