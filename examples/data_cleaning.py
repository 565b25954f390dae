# %% [markdown]
# # Find flipped labels, drop them, train again
#
# A tenth of the training labels of handwritten digits are wrong. Rows whose presence harms other pictures most are
# looked at first; so are, for comparison, those with the highest training loss. Then the model is trained again
# without the first tenth of each ranking.
#
#     python examples/data_cleaning.py

# %%
import os
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
from transformers import pipeline

from hf_rgm import ClusterMap, DistillationConfig, ReverseGradientMatchingDistiller, TrajectoryCallback
from hf_rgm.demo import DemoSettings, build_trainer, inspection_order, load_data, loss_order, share_found
from hf_rgm.fidelity.retraining import retrain
from hf_rgm.plots import plot_inspection_curve

TINY = bool(os.environ.get("HF_RGM_TINY"))  # for the tests, which look at what happens, not at how well
settings = DemoSettings(num_queries=500, flipped_share=0.1, num_iterations=200)
if TINY:
    settings = DemoSettings(num_rows=120, num_queries=40, flipped_share=0.1, num_epochs=2, num_iterations=3)
seeds = (1,) if TINY else (1, 2, 3)
output = Path("data-cleaning-example")

# %% [markdown]
# ## Train, record, distil
# Half of the pictures held out ask; the other half shows whether it was worth it.

# %%
data = load_data(settings)
asking, judging = (data.queries.select(range(half, len(data.queries), 2)) for half in (0, 1))
recorder = TrajectoryCallback(output / "trajectory", overwrite=True)
trainer = build_trainer(settings)(data.train, settings.seed, [recorder])
trainer.train()

pixels = np.asarray(data.train["pixel_values"]).reshape(len(data.train), -1)
clusters = ClusterMap.from_embeddings(pixels, labels=np.asarray(data.train["labels"]), num_clusters_per_class=3)
config = DistillationConfig.from_preset("quick", tolerance=0.01, num_iterations=settings.num_iterations)
distiller = ReverseGradientMatchingDistiller(trainer.model, output / "trajectory", data.train, clusters, config=config)
attribute = pipeline("data-attribution", model=trainer.model, synset=distiller.distill())

# %% [markdown]
# ## Rank the rows

# %%
result = attribute(asking, rows=data.train)
orders = {
    "row scores": inspection_order(result),
    "training loss": loss_order(attribute.attributor.model, data.train),
    "random order": np.random.default_rng(0).permutation(len(data.train)),
}
for name, order in orders.items():
    print(f"Among the first tenth by {name}: {share_found(order, data.flipped, 0.1):.0%} of the flipped labels.")

# %% [markdown]
# ## Drop the first tenth and train again

# %%
num_dropped = len(data.train) // 10
subsets = {"nothing dropped": np.arange(len(data.train))}
subsets |= {f"by {name}": np.sort(order[num_dropped:]) for name, order in orders.items()}
subsets["all flipped labels dropped"] = np.flatnonzero(~data.flipped)
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
    print(f"{name}: accuracy {values.mean():.1%} on {len(judging)} other pictures, {len(seeds)} seeds.")

# %% [markdown]
# ## Look

# %%
figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4), layout="constrained")
fractions = np.linspace(0.01, 0.5, 50)
curves = {
    name: np.array([share_found(order, data.flipped, share) for share in fractions]) for name, order in orders.items()
}
plot_inspection_curve(fractions, curves, ax=left, what="flipped labels")
right.barh(list(subsets), 100 * accuracies.mean(1), color="#0072B2")
right.plot(100 * accuracies, np.arange(len(subsets)), "k.", alpha=0.6)
right.set(xlabel="accuracy of the model trained again, %", xlim=(100 * accuracies.min() - 3, 100))
right.invert_yaxis()
figure.savefig(output / "cleaning.png")
print(f"Look at {output / 'cleaning.png'}.")
