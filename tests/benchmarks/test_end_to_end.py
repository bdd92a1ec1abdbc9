"""The script that times whole models on a card, on a shape so small that the CPU does."""

import json
import sys
from pathlib import Path

import pytest

from benchmarks.gpu import end_to_end
from lowmoe.families.aliases import ALIASES

TINY = {
    **ALIASES["mixtral-8x7b"].config,
    "hidden_size": 64,
    "head_dim": 16,
    "intermediate_size": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_hidden_layers": 2,
    "vocab_size": 100,
}


def test_a_shape_is_written_timed_and_gone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config, out, work = tmp_path / "config.json", tmp_path / "out.json", tmp_path / "work"
    config.write_text(json.dumps(TINY))
    work.mkdir()
    arguments = ["--gpu", "none", "--work", str(work), "--only", str(config), "--planes", "1"]
    few = ["--prompt", "8", "--new", "4"]
    monkeypatch.setattr(sys, "argv", ["end_to_end", str(out), *arguments, *few])
    end_to_end.main()
    values = json.loads(out.read_text())
    assert values["held_to"] == "none"
    results = values["results"]
    assert [r["misses"] for r in results] == ["cpu", "page", "auto"]
    assert all(r["decode_tokens_per_s"] > 0 and r["bits"] == 2 for r in results)
    assert list(work.iterdir()) == []


def test_what_does_not_fit_is_said_and_the_next_is_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    large, small = tmp_path / "large.json", tmp_path / "small.json"
    large.write_text(json.dumps({**TINY, "head_dim": 15}))  # rope needs an even number
    small.write_text(json.dumps(TINY))
    out = tmp_path / "out.json"
    arguments = ["--gpu", "none", "--work", str(tmp_path), "--planes", "1", "--prompt", "4"]
    only = ["--new", "2", "--only", str(large), str(small)]
    monkeypatch.setattr(sys, "argv", ["end_to_end", str(out), *arguments, *only])
    end_to_end.main()
    first, *others = json.loads(out.read_text())["results"]
    assert "refused" in first
    assert len(others) == 3
