"""Models of the benchmark tasks, as `PreTrainedModel`s built in code."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F
from transformers import PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import ImageClassifierOutput


class SmallCnnConfig(PretrainedConfig):
    """Two convolutions of 16 and 32 channels (by default) and one linear layer."""

    model_type = "hf-rgm-small-cnn"

    def __init__(
        self, num_channels: int = 1, image_size: int = 8, hidden_sizes: tuple[int, ...] = (16, 32), **kwargs
    ) -> None:
        self.num_channels = num_channels
        self.image_size = image_size
        self.hidden_sizes = list(hidden_sizes)
        super().__init__(**kwargs)


class SmallCnnForImageClassification(PreTrainedModel):
    """The CNN of the digits feasibility runs: 6,090 parameters for 8x8 images and ten classes."""

    config_class = SmallCnnConfig
    main_input_name = "pixel_values"

    def __init__(self, config: SmallCnnConfig) -> None:
        super().__init__(config)
        sizes = [config.num_channels, *config.hidden_sizes]
        self.convolutions = nn.ModuleList(
            nn.Conv2d(before, after, 3, padding=1) for before, after in zip(sizes, sizes[1:], strict=False)
        )
        side = config.image_size // 2 ** len(config.hidden_sizes)
        self.classifier = nn.Linear(sizes[-1] * side * side, config.num_labels)
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, nn.Conv2d | nn.Linear):
            module.reset_parameters()

    def forward(self, pixel_values: torch.Tensor, labels: torch.Tensor | None = None) -> ImageClassifierOutput:
        hidden = pixel_values
        for convolution in self.convolutions:
            hidden = F.avg_pool2d(F.gelu(convolution(hidden)), 2)
        logits = self.classifier(hidden.flatten(1))
        loss = F.cross_entropy(logits, labels) if labels is not None else None
        return ImageClassifierOutput(loss=loss, logits=logits)
