# %% [markdown]
# # Find the vendor that mislabels, drop it, train again
#
# Handwritten digits come from eight vendors; one of them labels its 4s as 9s. Which vendor made the model misread test
# digits, and which rows? Then the model is trained again without that vendor, without the first tenth of the rows in
# the order of their scores, and, for comparison, without those of the highest training loss.
#
#     python examples/data_cleaning.py

# %%
import os
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
from transformers import pipeline

from hf_rgm import ClusterMap, TrajectoryCallback
from hf_rgm.demo import (
    DemoSettings,
    build_trainer,
    inspection_order,
    load_data,
    loss_order,
    right_answers,
    share_found,
)
from hf_rgm.fidelity.retraining import retrain
from hf_rgm.plots import plot_inspection_curve

TINY = bool(os.environ.get("HF_RGM_TINY"))  # for the tests, which look at what happens, not at how well
settings = DemoSettings(num_rows=120, num_queries=40, num_epochs=2) if TINY else DemoSettings(num_queries=500)
seeds = (1,) if TINY else (1, 2, 3)
output = Path("data-cleaning-example")

# %% [markdown]
# ## Train and record
# Half of the digits held out ask; the other half shows whether it was worth it.

# %%
data = load_data(settings)
asking, judging = (data.queries.select(range(half, len(data.queries), 2)) for half in (0, 1))
recorder = TrajectoryCallback(output / "trajectory", overwrite=True)
trainer = build_trainer(settings)(data.train, settings.seed, [recorder])
trainer.train()

# %% [markdown]
# ## Ask about what it misreads
# No synset is needed where the rows are at hand.

# %%
clusters = ClusterMap.from_column(data.train, "vendor")
attribute = pipeline(
    "data-attribution", model=trainer.model, trajectory=output / "trajectory", rows=data.train, clusters=clusters
)
misread = asking.select(np.flatnonzero(~right_answers(trainer.model, asking)))
result = attribute(misread)
print(result.top(len(clusters.names), largest=False).to_string(index=False))
worst = result.top(1, largest=False)["cluster"].iloc[0]
print(f"{worst} harms the {len(misread)} misread digits most.")
orders = {
    "row scores": inspection_order(result),
    "training loss": loss_order(attribute.attributor.model, data.train),
    "random order": np.random.default_rng(0).permutation(len(data.train)),
}
for name, order in orders.items():
    print(f"Among the first tenth by {name}: {share_found(order, data.mislabelled, 0.1):.0%} of the wrong labels.")

# %% [markdown]
# ## Drop, and train again

# %%
num_dropped = len(data.train) // 10
subsets = {"nothing dropped": np.arange(len(data.train))}
subsets[f"without {worst}"] = np.flatnonzero(clusters.cluster_ids != clusters.names.index(worst))
subsets |= {f"a tenth dropped by {name}": np.sort(order[num_dropped:]) for name, order in orders.items()}
subsets["all wrong labels dropped"] = np.flatnonzero(~data.mislabelled)
accuracies = retrain(
    build_trainer(settings),
    data.train,
    list(subsets.values()),
    judging,
    seeds=seeds,
    objective="accuracy",
    output_dir=output / f"retrainings-{len(data.train)}",
)[..., 0]
for name, values in zip(subsets, accuracies, strict=True):
    print(f"{name}: accuracy {values.mean():.1%} on {len(judging)} other digits, {len(seeds)} seeds.")

# %% [markdown]
# ## Look

# %%
figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4), layout="constrained")
fractions = np.linspace(0.01, 0.5, 50)
curves = {
    name: np.array([share_found(order, data.mislabelled, share) for share in fractions])
    for name, order in orders.items()
}
plot_inspection_curve(fractions, curves, ax=left, what="wrong labels")
right.barh(list(subsets), 100 * accuracies.mean(1), color="#0072B2")
right.plot(100 * accuracies, np.arange(len(subsets)), "k.", alpha=0.6)
right.set(xlabel="accuracy of the model trained again, %", xlim=(100 * accuracies.min() - 3, 100))
right.invert_yaxis()
figure.savefig(output / "cleaning.png")
print(f"Look at {output / 'cleaning.png'}.")
