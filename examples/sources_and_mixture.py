# %% [markdown]
# # Which source helps, and what should there be more of?
#
# A text classifier is trained on reviews from four sources, and is to serve one kind of them. Scores say which source
# helps it; a suggested mixture says how often to take each. It is then trained again on that mixture, to see.
#
#     python examples/sources_and_mixture.py

# %%
import os
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
from datasets import Dataset
from text_classification import build_model
from texts import reviews, told_sources, word_tokenizer
from transformers import DataCollatorWithPadding, Trainer, TrainingArguments, pipeline

from hf_rgm import ClusterMap, DistillationConfig, ReverseGradientMatchingDistiller, TrajectoryCallback
from hf_rgm.fidelity.retraining import retrain

TINY = bool(os.environ.get("HF_RGM_TINY"))  # for the tests, which look at what happens, not at how well
num_rows, num_epochs, num_iterations = (80, 2, 5) if TINY else (480, 4, 300)
seeds = (1,) if TINY else (1, 2, 3)
served = "skaters"
output = Path("mixture-example")

# %% [markdown]
# ## Train and record

# %%
tokenizer = word_tokenizer(reviews(num_rows)["text"])
collator = DataCollatorWithPadding(tokenizer)


def tokenized(dataset: Dataset) -> Dataset:
    return dataset.map(lambda row: tokenizer(row["text"]), batched=True)


def build_trainer(dataset: Dataset, seed: int, callbacks=()) -> Trainer:
    arguments = TrainingArguments(
        output_dir=str(output / "training"),
        num_train_epochs=num_epochs,
        per_device_train_batch_size=16,
        learning_rate=5e-4,
        seed=seed,
        save_strategy="no",
        logging_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )
    model = build_model(None, tokenizer, seed)
    return Trainer(model, arguments, train_dataset=dataset, data_collator=collator, callbacks=list(callbacks))


train = tokenized(reviews(num_rows))
asking, judging = (tokenized(reviews(48, sources=[served], seed=seed)) for seed in (101, 102))
trainer = build_trainer(train, 0, [TrajectoryCallback(output / "trajectory", overwrite=True)])
trainer.train()

# %% [markdown]
# ## Which source helps?

# %%
clusters = ClusterMap.from_column(train, "source")
config = DistillationConfig(samples_per_cluster=16, num_iterations=num_iterations, num_tokens=8)
distiller = ReverseGradientMatchingDistiller(
    trainer.model, output / "trajectory", train, clusters, config=config, data_collator=collator
)
attribute = pipeline("data-attribution", model=trainer.model, tokenizer=tokenizer, synset=distiller.distill())
result = attribute(asking, objective="mean_loss", rows=train)
print(f"How each source changes the mean loss on reviews by {served}: {told_sources(result, result.query_ids[0])}.")

# %% [markdown]
# ## What should there be more of?
# Weights that lower this loss at the same amount of data, and what is predicted of them to first order.

# %%
mixture = attribute.suggest_mixture(asking, objective="mean_loss", rows=train, min_agreement=None)
print(mixture.to_pandas().round(2).to_string(index=False))

# %% [markdown]
# ## Train on it
# Other reviews than those that asked say whether it was worth it.

# %%
losses = retrain(
    build_trainer,
    train,
    [np.arange(len(train)), mixture.resample()],
    judging,
    seeds=seeds,
    objective="mean_loss",
    data_collator=collator,
)[..., 0]
before, after = losses.mean(1)
print(f"Mean loss on other reviews by {served}: {before:.3f} as it was, {after:.3f} on the suggested mixture.")

# %% [markdown]
# ## Look

# %%
figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
result.plot("bars", ax=left, title=f"mean loss on {served}: below 0 helps")
table = mixture.to_pandas()
right.barh(table["cluster"], table["weight"], color="#0072B2")
right.axvline(1, color="black", linewidth=1)
right.invert_yaxis()
right.set(xlabel="suggested weight (1: as it was)", title=f"loss {before:.3f} before, {after:.3f} after")
figure.savefig(output / "mixture.png")
print(f"Look at {output / 'mixture.png'}.")
