"""The demo's data: real, large enough, the same every time, and no function in both halves."""

from __future__ import annotations

import json

from moka_cli.demo_data import build_pairs, write_splits


def test_pairs_come_from_the_standard_library_and_none_stands_twice():
    pairs = build_pairs()
    assert len(pairs) > 2000
    prompts = [pair["prompt"] for pair in pairs]
    completions = [pair["completion"] for pair in pairs]
    assert len(set(prompts)) == len(set(completions)) == len(pairs)
    by_prompt = dict(zip(prompts, completions, strict=True))
    assert by_prompt["What does textwrap.dedent do?"].startswith("Remove any common leading whitespace")
    assert "What does math.gcd do?" in by_prompt


def test_no_function_is_in_both_halves_and_the_split_is_fixed(tmp_path):
    halves = []
    for folder in ("first", "second"):
        paths = write_splits(tmp_path / folder, held_out=100, seed=0)
        halves.append([[json.loads(line) for line in path.read_text().splitlines()] for path in paths])
    assert halves[0] == halves[1]
    train, held_out = ({row["prompt"] for row in rows} for rows in halves[0])
    assert len(held_out) == 100
    assert not train & held_out
    assert not {row["completion"] for row in halves[0][0]} & {row["completion"] for row in halves[0][1]}
