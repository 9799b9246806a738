"""A run from end to end on models with a norm inside their FFNs, and with a block that layers share."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from checkpoints import POSITIONS, VOCABULARY, small_tokenizer
from ffnscope.io import read_scores
from ffnscope.run import config_from_dict
from runs import quiet_run, small_run, strict_json
from tiny import redraw
from tiny_all import D_FF, HIDDEN, tiny_causal_lm, tiny_config


def saved(folder: Path, name: str) -> Path:
    changed = tiny_config(name, vocab_size=VOCABULARY, max_position_embeddings=POSITIONS)
    model: Any = type(tiny_causal_lm(name))(changed)
    redraw(model.float().eval(), 0).save_pretrained(folder)
    small_tokenizer().save_pretrained(folder)
    return folder


@pytest.mark.parametrize(("name", "own"), [("bitnet", 1), ("zamba2", 2 * 2 * 8)])
def test_a_run(name: str, own: int, texts: Path, tmp_path: Path) -> None:
    checkpoint = saved(tmp_path / "model", name)
    blocks = small_run(
        checkpoint,
        texts,
        tmp_path / "out",
        metrics={"enabled": ["wanda", "flap"]},
        pruning={"ratios": [0.5], "algorithms": ["scar_loss_proxy"]},
        supernode={"enabled": True, "top_k": 3},
    )
    found = quiet_run(config_from_dict(blocks))
    model = strict_json(found.folder / "summary.json")["model"]
    assert model["ffn_parameters_per_channel"] == 3 * HIDDEN + own
    scores, _ = read_scores(found.folder / "scores.safetensors")
    sites = scores["scar_loss_proxy"].sites
    assert [site["twins"] for site in model["sites"]] == [list(site.twins) for site in sites]
    assert [site["norm"] for site in model["sites"]] == [site.norm for site in sites]
    assert {site.d_ff for site in sites} == {D_FF}
