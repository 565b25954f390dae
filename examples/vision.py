# %% [markdown]
# # Which pictures taught the model this?
#
# A small vision Transformer learns handwritten digits, or clothes with `DATA=fashion` (Debian's package
# `dataset-fashion-mnist`). One callback records the training. With the training rows the record says what taught the
# model the pictures that it is least sure of. A synset of a few synthetic pictures per cluster can be shared.
#
#     python examples/vision.py
#     DATA=fashion python examples/vision.py

# %%
import os
import sys
from pathlib import Path

import numpy as np
from datasets import Dataset
from sklearn.datasets import load_digits
from transformers import Trainer, TrainingArguments, ViTConfig, ViTForImageClassification, pipeline, set_seed

from hf_rgm import ClusterMap, DistillationConfig, ReverseGradientMatchingDistiller, TrajectoryCallback
from hf_rgm.plots import plot_synset_gallery

DATA = os.environ.get("DATA", "digits")
TINY = bool(os.environ.get("HF_RGM_TINY"))  # for the tests, which look at what happens, not at how well
num_rows, num_queries, num_epochs, num_iterations = (120, 8, 2, 3) if TINY else (1200, 100, 15, 400)
output = Path("vision-example")

# %% [markdown]
# ## Data
# A dataset as `Trainer` takes it: `pixel_values` and `labels`.

# %%
if DATA == "fashion":
    sys.path.insert(0, str(Path(__file__).parents[1]))
    from benchmarks.tasks.fashion import load_images

    images, labels, *_ = load_images()
    classes = ["T-shirt", "trousers", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot"]
else:
    digits = load_digits()
    order = np.random.default_rng(0).permutation(len(digits.target))
    images, labels, classes = digits.images[order], digits.target[order], [f"digit {label}" for label in range(10)]
images = (images / images.max()).astype(np.float32)[:, None]


def dataset(rows: slice) -> Dataset:
    return Dataset.from_dict({"pixel_values": images[rows], "labels": labels[rows]}).with_format("torch")


train, test = dataset(slice(num_rows)), dataset(slice(num_rows, num_rows + num_queries))

# %% [markdown]
# ## Training
# As always, with one callback.

# %%
set_seed(0)
side = images.shape[-1]
config = ViTConfig(
    image_size=side,
    patch_size=side // 4,
    num_channels=1,
    hidden_size=32,
    num_hidden_layers=2,
    num_attention_heads=4,
    intermediate_size=64,
    hidden_dropout_prob=0.0,
    attention_probs_dropout_prob=0.0,
)
config.num_labels = len(classes)
arguments = TrainingArguments(
    output_dir=str(output / "training"),
    num_train_epochs=num_epochs,
    per_device_train_batch_size=50,
    learning_rate=3e-3,
    warmup_steps=20,
    max_grad_norm=0.0,
    save_strategy="no",
    logging_strategy="no",
    report_to="none",
)
recorder = TrajectoryCallback(output / "trajectory", overwrite=True)
trainer = Trainer(ViTForImageClassification(config), arguments, train_dataset=train, callbacks=[recorder])
trainer.train()

# %% [markdown]
# ## The synset
# Clusters are parts of classes, by k-means on the pixels; the model's features would do too.

# %%
clusters = ClusterMap.from_embeddings(
    images[:num_rows], labels=labels[:num_rows], num_clusters_per_class=3, label_names=classes
)
distiller = ReverseGradientMatchingDistiller(
    trainer.model,
    output / "trajectory",
    train,
    clusters,
    config=DistillationConfig.from_preset("quick", tolerance=0.01, num_iterations=num_iterations),
)
synset = distiller.distill()
synset.save_pretrained(output / "synset")
print(f"{synset.num_samples} pictures for {num_rows}, matching error {synset.matching_error:.3f}.")
plot_synset_gallery(
    synset.samples.inputs.flatten(0, 1).numpy(),
    [name for name in clusters.names for _ in range(synset.samples.log_weights.shape[1])],
    title="What stands in for the training set",
).figure.savefig(output / "synset.png")

# %% [markdown]
# ## Questions
# The default objective is the margin of the true label: negative where the model is wrong.

# %%
attribute = pipeline("data-attribution", model=trainer.model, synset=synset)
result = attribute(test, rows=train)
hardest = [result.query_ids[position] for position in np.argsort(result.objective_values)[:4]]
print(result.SIGN_CONVENTION)
for query in hardest:
    best, worst = result.top(1, query), result.top(1, query, largest=False)
    print(
        f"Test picture {query}, {classes[labels[num_rows + query]]}, margin {result.objective_values[query]:+.2f}: "
        f"helped most by {best['cluster'][0]} ({best['score'][0]:+.2f}), "
        f"harmed most by {worst['cluster'][0]} ({worst['score'][0]:+.2f})."
    )

# %% [markdown]
# ## Look
# One file with the clusters and the training pictures that matter for each of these.

# %%
report = result.to_html(
    output / "report.html",
    title=f"Which pictures taught the model this? ({DATA})",
    query_ids=hardest,
    queries=test,
    rows=train,
    synset=synset,
)
print(f"Look at {report} and {output / 'synset.png'}.")
