"""Pictures of trees over prompts, and the demonstration in a small size."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from language_helpers import random_ids, small_model

from grootl import reference
from grootl.modeling_grootl import Prompts, lay_out
from grootl.visualization import plot_arcs, prompt_trees

ROOT = Path(__file__).parents[2]


@torch.no_grad()
def test_trees_of_layers_are_those_of_the_definition():
    model, ids = small_model(), random_ids(1, 17)
    trees = prompt_trees(model, ids)
    assert len(trees) == 3
    hidden = model.backbone.embeddings(ids)
    prompts = Prompts(None, torch.tensor([0]), torch.tensor([17]))
    layout = lay_out(model.config, hidden, None, prompts, caches=False)
    for block, tree in zip(model.backbone.layers, trees, strict=True):
        mixer = block.mixer
        u = mixer.in_proj(block.norm(hidden)).chunk(2, dim=-1)[0]
        u = F.silu(mixer.conv1d(u.transpose(1, 2))[..., :17].transpose(1, 2))
        dt, B, _ = mixer.x_proj(u).split([3, 4, 4], dim=-1)
        x = (F.softplus(mixer.dt_proj(dt)) * u)[0, :, :, None] * B[0, :, None, :]
        assert tree.parent[0].tolist() == reference.parents(x, 17)
        hidden = block(hidden, layout)
    assert not any(len(module._forward_hooks) for module in model.modules())


def test_arcs_lead_to_the_parents():
    from matplotlib.patches import Arc

    figure = plot_arcs(list("abcd"), [[1, 2, 3, 3], [3, 3, 3, 3]], ["Chain", "Star"])
    chain, star, scale = figure.axes
    ends = [sorted((arc.center[0] - arc.width / 2, arc.center[0] + arc.width / 2) for arc in star.patches)]
    assert ends == [[(0, 3), (1, 3), (2, 3)]]
    assert len(chain.patches) == 3 and all(isinstance(arc, Arc) for arc in chain.patches)
    assert "at most 3 edges" in chain.get_title("left") and "at most 1 edges" in star.get_title("left")
    assert [label.get_text() for label in star.get_xticklabels()] == list("abcd")
    # One scale for both trees: the arc of the token before the root has the same colour in both.
    assert chain.patches[2].get_edgecolor() == star.patches[2].get_edgecolor() != chain.patches[0].get_edgecolor()
    assert scale.get_ylabel() == "edges from the root" and scale.get_ylim() == (0, 3)


@pytest.mark.slow
def test_the_demonstration(tmp_path):
    small = ["--pretrain-steps", "3", "--records", "16", "--test-records", "6", "--hidden-size", "16", "--layers", "2"]
    command = [sys.executable, str(ROOT / "tools" / "demo_language.py"), "--out-dir", str(tmp_path), "--seeds", "2"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    environment |= {"CUDA_VISIBLE_DEVICES": ""}
    run = {"env": environment, "capture_output": True, "text": True, "timeout": 550}
    first = subprocess.run([*command, *small], **run)
    assert first.returncode == 0, first.stdout + first.stderr
    rows = (tmp_path / "table.md").read_text().splitlines()
    assert [row.split("|")[1].strip() for row in rows[2:]] == ["Mamba", "+ all weights", "+ LoRA", "+ GrootL"]
    assert all(row.count("±") == 2 for row in rows[2:])
    assert (tmp_path / "language_tree.png").stat().st_size > 10_000
    finished = tmp_path / "seed-0" / "results.json"
    before = finished.stat().st_mtime
    # What is finished is reused; what is missing is made again, with the same result.
    missing = tmp_path / "seed-1" / "results.json"
    expected = json.loads(missing.read_text())
    missing.unlink()
    again = subprocess.run([*command, *small], **run)
    assert again.returncode == 0, again.stdout + again.stderr
    assert finished.stat().st_mtime == before
    assert json.loads(missing.read_text()) == expected
