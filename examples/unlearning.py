# %% [markdown]
# # Unlearn a class, and check that it is gone
#
# A vision Transformer has learned ten digits. One of them is to be forgotten, without training again. Whether it is
# gone is checked against a model that never saw it: both must fail on the digit alike, and agree elsewhere.
#
#     python examples/unlearning.py

# %%
import os
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import torch
from transformers import pipeline

from hf_rgm import ClusterMap, DistillationConfig, ReverseGradientMatchingDistiller, TrajectoryCallback
from hf_rgm.demo import DemoSettings, build_trainer, load_data
from hf_rgm.engines.objectives import log_odds_margin

TINY = bool(os.environ.get("HF_RGM_TINY"))  # for the tests, which look at what happens, not at how well
settings = DemoSettings(num_queries=500, wrong_share=0.0, num_iterations=200)
if TINY:
    settings = DemoSettings(num_rows=120, num_queries=40, wrong_share=0.0, num_epochs=2, num_iterations=3)
forgotten = 3
output = Path("unlearning-example")

# %% [markdown]
# ## Train, record, distil
# Each digit is a cluster.

# %%
data = load_data(settings)
recorder = TrajectoryCallback(output / "trajectory", overwrite=True)
trainer = build_trainer(settings)(data.train, settings.seed, [recorder])
trainer.train()
clusters = ClusterMap.from_column(data.train, "labels")
config = DistillationConfig(samples_per_cluster=5, num_iterations=settings.num_iterations)
distiller = ReverseGradientMatchingDistiller(trainer.model, output / "trajectory", data.train, clusters, config=config)
attribute = pipeline("data-attribution", model=trainer.model, synset=distiller.distill())

# %% [markdown]
# ## Forget
# The recorded training is replayed without the cluster. What comes back is a model of the same class. Left to itself
# the default, linearised replay by the rows, goes back only as far as it keeps everything else as it was. The digit is
# then wrong, but less surely so than for a model that never saw it. To forget more, take anchored replay by the
# synset, say how far back to go, and look at what it costs.

# %%
name = f"labels={forgotten}"
careful = attribute.unlearn([name], rows=data.train)
unlearned = attribute.unlearn([name], rows=data.train, engine="replay", rewind=0.6)
for how, model in (("left to itself", careful), ("from 60% of training", unlearned)):
    print(how, *model.checks, sep="\n  ")
unlearned.save_pretrained(output / "model-without-it")

# %% [markdown]
# ## Is it gone?
# The truth is a model that was trained without the digit, with another seed.

# %%
kept = np.flatnonzero(np.asarray(data.train["labels"]) != forgotten)
truth = build_trainer(settings)(data.train.select(kept), settings.seed + 1)
truth.train()


def margins(model: torch.nn.Module) -> np.ndarray:
    """Log-odds of the right digit for each held-out picture; positive where the model is right."""
    held_out = data.queries[:]
    with torch.no_grad():
        logits = model.eval().cpu()(pixel_values=held_out["pixel_values"]).logits
    return log_odds_margin(logits, held_out["labels"]).numpy()


is_forgotten = np.asarray(data.queries["labels"]) == forgotten
models = {
    "trained": trainer.model,
    "careful": careful.model,
    "unlearned": unlearned.model,
    "never saw it": truth.model,
}
found = {name: margins(model) for name, model in models.items()}
for name, values in found.items():
    of_it, of_others = values[is_forgotten], values[~is_forgotten]
    print(
        f"{name}: log-odds {of_it.mean():+.1f} and {(of_it > 0).mean():.0%} right on the digit {forgotten}, "
        f"{(of_others > 0).mean():.0%} right on the others."
    )
gone = (found["unlearned"][is_forgotten] > 0).mean() <= (found["never saw it"][is_forgotten] > 0).mean() + 0.05
print(f"Digit {forgotten} is {'gone' if gone else 'NOT gone: go back further'}.")

# %% [markdown]
# ## Look

# %%
figure, axes = plt.subplots(1, 2, figsize=(10, 4), sharey=True, layout="constrained")
for ax, where, title in zip(
    axes, (is_forgotten, ~is_forgotten), (f"digit {forgotten}", "the other digits"), strict=True
):
    ax.boxplot([values[where] for values in found.values()], tick_labels=list(found))
    ax.axhline(0, color="black", linewidth=1)
    ax.set(title=f"{title}, held out", ylabel="log-odds of the right digit" if ax is axes[0] else "")
figure.savefig(output / "unlearning.png")
print(f"Look at {output / 'unlearning.png'}.")
