"""How many of our own frames lie between a question and the first product of the engine that answers it."""

import sys
from pathlib import Path

import pytest
from transformers import pipeline

import hf_rgm
from hf_rgm.engines.segment_map import SegmentMap
from hf_rgm.testing import tiny_recorded_run, tiny_synset

LIBRARY = str(Path(hf_rgm.__file__).parent)
MAX_FRAMES = 6
RUN = tiny_recorded_run()


def own_frames() -> list[str]:
    frame, found = sys._getframe(1), []
    while frame is not None:
        if frame.f_code.co_filename.startswith(LIBRARY):
            found.append(f"{Path(frame.f_code.co_filename).stem}.{frame.f_code.co_name}")
        frame = frame.f_back
    return found[::-1]


@pytest.fixture(params=["rows", "synset"])
def attribute(request):
    if request.param == "synset":
        return pipeline("data-attribution", model=RUN.model, synset=tiny_synset())
    return pipeline(
        "data-attribution", model=RUN.model, trajectory=RUN.trajectory, rows=RUN.train_dataset, clusters=RUN.clusters
    )


def test_the_engine_is_near(attribute, monkeypatch):
    depths = []
    forward = SegmentMap.forward
    monkeypatch.setattr(SegmentMap, "forward", lambda *arguments: depths.append(own_frames()) or forward(*arguments))
    attribute(RUN.queries, rewind=0.5)
    # The last frame, that of the product itself, is not there yet.
    assert depths
    assert max(map(len, depths)) < MAX_FRAMES, depths[0]
