"""Check that two processes with sharded parameters do what one process does."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest
import torch

from opensora.training.clip import gradient_norm

WORKER = Path(__file__).with_name("sharded_worker.py")
spec = importlib.util.spec_from_file_location("sharded_worker", WORKER)
worker = importlib.util.module_from_spec(spec)
spec.loader.exec_module(worker)


@pytest.fixture(scope="module")
def runs(tmp_path_factory, forks):
    """Return what one process and each of two come to, and their folders."""
    one, two = tmp_path_factory.mktemp("one"), tmp_path_factory.mktemp("two")
    started = [forks.start(WORKER, str(two), str(rank), "2") for rank in range(2)]
    alone = worker.run(one, 0, 1)
    for fork in started:
        assert fork.wait() == 0, fork.printed
    both = [torch.load(two / f"result-{rank}.pt", weights_only=True) for rank in range(2)]
    return alone, both, one, two


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_weights_averages_and_norms_are_those_of_one_process(runs, name):
    alone, both, _, _ = runs
    for sharded in both:
        for kind in ("weights", "averages", "swapped", "loaded"):
            for key, value in alone[name][kind].items():
                close = torch.allclose(value, sharded[name][kind][key], rtol=1e-4, atol=1e-5)
                assert close, (kind, key)
        for one, two in zip(alone[name]["norms"], sharded[name]["norms"], strict=True):
            assert one == pytest.approx(two, rel=1e-4)
    assert any(before != after for before, after, _ in alone[name]["norms"])


def test_every_process_holds_only_its_part_of_weights_and_averages(runs):
    alone, both, _, _ = runs
    parts = [sharded["adamw"]["held"] for sharded in both]
    assert sum(parts) == alone["adamw"]["held"]
    assert max(parts) < 0.7 * sum(parts)


def test_swapped_weights_are_the_averages(runs):
    for result in (runs[0], *runs[1]):
        for key, value in result["adamw"]["averages"].items():
            assert torch.equal(result["adamw"]["swapped"][key], value)
            assert torch.equal(result["adamw"]["loaded"][key], value)


def test_validation_is_the_same_to_the_last_bit_on_any_number_of_processes(runs):
    alone, both, _, _ = runs
    for sharded in both:
        assert sharded["adamw"]["validation"] == alone["adamw"]["validation"]
        losses = [
            [
                result["adamw"][f"{kind} validation"]["validation_loss"]
                for result in (alone, sharded)
            ]
            for kind in ("sharded", "averaged")
        ]
        for one, two in losses:
            assert two == pytest.approx(one, rel=1e-3)
        assert losses[0][0] != pytest.approx(losses[1][0], rel=0.1)
    assert alone["adamw"]["validation"]["validation_samples"] == 5


def test_norms_count_repeated_gradients_once(runs):
    model = worker.build()
    model(torch.ones(2, 6)).sum().backward()
    norm = gradient_norm(model.parameters())
    for sharded in runs[1]:
        assert sharded["meshes"] == pytest.approx([norm, 1e-3, norm, 1e-3], rel=1e-4)


def test_metrics_sum_over_processes_and_the_first_alone_writes(runs):
    _, _, one, two = runs
    lines = [json.loads((folder / "metrics.jsonl").read_text()) for folder in (one, two)]
    for key in ("loss", "bands", "kl", "skipped"):
        assert lines[0][key] == pytest.approx(lines[1][key]), key
    assert lines[0]["loss"] == 1.5
    assert lines[0]["kl"] == 2.0
    assert lines[0]["bands"] == {"0-100": 0.0, "200-300": 1.0, "500-600": 2.0, "700-800": 3.0}
    tokens = [line["tokens_per_second"] * 2 * line["step_seconds"] for line in lines]
    assert tokens == pytest.approx([800, 800], rel=0.01)


def test_one_bad_process_makes_all_skip(runs):
    _, both, _, two = runs
    assert [result["verdict"] for result in both] == ["skip", "skip"]
    line = json.loads((two / "bad_steps.jsonl").read_text())
    assert line["samples"] == ["sample of 1"]
