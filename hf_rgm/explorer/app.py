"""The explorer: a page in the browser that shows attributions and predicts without clusters."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import datasets
import numpy as np
from transformers import AutoTokenizer, pipeline

from hf_rgm.attribution.attributor import Attributor
from hf_rgm.explorer.what_if import NEEDS, replay_without, what_if_section
from hf_rgm.files.embedded import without_paths
from hf_rgm.hub.repository import folder_or_repository
from hf_rgm.model.row_reader import DataCollator
from hf_rgm.pages import views
from hf_rgm.pages.exhibit import Exhibit, of_query
from hf_rgm.pages.html import STYLE, Section, escaped, fragment, paragraphs
from hf_rgm.pages.shown_rows import shortened
from hf_rgm.results.result import AttributionResult
from hf_rgm.results.result_files import CONFIG_FILE
from hf_rgm.synset.synset import Synset

if TYPE_CHECKING:
    import gradio

TITLE = "Training-data attribution"
ATTRIBUTIONS = "attributions"  # folder in a demo's, beside `synset`, `model`, `rows` and `queries`
ALL_QUERIES = -1
KEPT_REPLAYS = 32
# The cards are light whatever the browser prefers, so the frame around them is too.
APP_STYLE = STYLE + Path(__file__).with_name("app.css").read_text(encoding="utf-8")


class Explorer:
    """What the page shows for each choice: functions that return HTML, without Gradio."""

    def __init__(self, exhibit: Exhibit) -> None:
        self.exhibit = exhibit
        self._replayed = functools.lru_cache(maxsize=KEPT_REPLAYS)(functools.partial(replay_without, exhibit))

    def query_choices(self) -> list[tuple[str, int]]:
        """Names and positions of the queries, after the mean over all."""
        result = self.exhibit.result
        values = zip(result.query_ids, result.objective_values.tolist(), strict=True)
        names = [f"{query} ({result.objective} {value:.3g})" for query, value in values]
        return [(f"All {result.num_queries} queries (mean)", ALL_QUERIES), *_choices(names)]

    def cluster_choices(self) -> list[tuple[str, int]]:
        """Names and indices of the clusters."""
        return _choices(self.exhibit.result.cluster_names)

    def strongest(self, query: int) -> int:
        """The cluster with the largest score, positive or negative."""
        return int(np.abs(of_query(self.exhibit.result.scores, _position(query))).argmax())

    def of_query(self, query: int) -> tuple[str, str, str]:
        """A query, its clusters and its rows."""
        shown = (views.query_section, views.clusters_section, views.rows_section)
        query_view, clusters_view, rows_view = (_html(view(self.exhibit, _position(query))) for view in shown)
        return query_view, clusters_view, rows_view

    def cluster(self, cluster: int, query: int) -> str:
        return _html(views.cluster_section(self.exhibit, cluster, _position(query)))

    def what_if(self, clusters: Sequence[int], query: int) -> str:
        """Predictions without some clusters, or why there are none."""
        chosen = tuple(sorted(set(clusters)))
        try:
            section = what_if_section(self.exhibit, self._replayed(chosen), chosen, _position(query))
        except ValueError as error:
            section = Section("Nothing was replayed")
            section.text(str(error))
        return _html(section)


def build_app(exhibit: Exhibit, *, title: str = TITLE) -> gradio.Blocks:
    """The page, not yet served: `app.launch(**launch_settings())` serves it."""
    gr = _gradio()
    explorer = Explorer(exhibit)
    queries, clusters = explorer.query_choices(), explorer.cluster_choices()
    first = queries[1][1]
    first_query, first_clusters, first_rows = explorer.of_query(first)
    quiet: dict[str, Any] = {"show_progress": "minimal", "api_visibility": "private"}
    with gr.Blocks(title=title, analytics_enabled=False, fill_width=True) as app:
        html = functools.partial(gr.HTML, apply_default_css=False)
        html(fragment(f"<h1>{escaped(title)}</h1>"), elem_id="rgm-heading")
        html(fragment(paragraphs(views.banner(exhibit.result))), elem_id="rgm-banner")
        with gr.Row():
            with gr.Column(scale=1, min_width=280):
                query = gr.Dropdown(queries, value=first, label="Query", elem_id="rgm-query")
                query_view = html(first_query, elem_id="rgm-query-view")
            with gr.Column(scale=2, min_width=280):
                clusters_view = html(first_clusters, elem_id="rgm-clusters-view")
        with gr.Tabs():
            with gr.Tab("Cluster"):
                strongest = explorer.strongest(first)
                cluster = gr.Dropdown(clusters, value=strongest, label="Cluster", elem_id="rgm-cluster")
                cluster_view = html(explorer.cluster(strongest, first), elem_id="rgm-cluster-view")
            with gr.Tab("Rows"):
                rows_view = html(first_rows, elem_id="rgm-rows-view")
            with gr.Tab("What if"):
                dropped = gr.Dropdown(
                    clusters,
                    value=[],
                    multiselect=True,
                    label="Clusters to remove from training",
                    interactive=exhibit.can_replay,
                    elem_id="rgm-dropped",
                )
                replay = gr.Button(
                    "Predict without them", variant="primary", interactive=exhibit.can_replay, elem_id="rgm-replay"
                )
                hint = Section("What would the model say without some of its training data?")
                hint.text("Choose clusters, then predict." if exhibit.can_replay else NEEDS)
                what_if_view = html(_html(hint), elem_id="rgm-what-if-view")
                replayed = gr.State([])
            with gr.Tab("All scores"):
                html(_html(views.heatmap_section(exhibit.result)), elem_id="rgm-heatmap-view")
            with gr.Tab("About"):
                html(_html(views.facts_section(exhibit.result)), elem_id="rgm-facts-view")

        def choose(query: int, removed: list[int]) -> tuple[Any, ...]:
            strongest = explorer.strongest(query)
            predicted = explorer.what_if(removed, query) if removed else gr.skip()
            return (*explorer.of_query(query), strongest, explorer.cluster(strongest, query), predicted)

        def remove(clusters: list[int], query: int) -> tuple[str, list[int]]:
            return explorer.what_if(clusters, query), clusters

        shown = [query_view, clusters_view, rows_view, cluster, cluster_view, what_if_view]
        query.input(choose, [query, replayed], shown, **quiet)
        cluster.input(explorer.cluster, [cluster, query], cluster_view, **quiet)
        replay.click(remove, [dropped, query], [what_if_view, replayed], **quiet)
    return app


def launch_settings() -> dict[str, Any]:
    """Arguments of `launch` for the page from [`build_app`]: its style, and nothing fetched from elsewhere."""
    theme = _gradio().themes.Default(font=("system-ui", "sans-serif"), font_mono=("ui-monospace", "monospace"))
    return {"theme": theme, "css": APP_STYLE, "footer_links": [], "ssr_mode": False}


def explore(
    attributions: AttributionResult | str | Path, *, title: str = TITLE, launch: bool = True, **options: Any
) -> gradio.Blocks:
    """
    Shows attributions in the browser. Needs the extra `explorer`.

    `options` are those of [`open_exhibit`], such as `synset`, `model`, `rows` and `queries`, and those of
    `gradio.Blocks.launch`, such as `server_port`. `launch=False` only builds the page.
    """
    _gradio()
    given = {name: options.pop(name) for name in inspect.signature(open_exhibit).parameters if name in options}
    app = build_app(open_exhibit(attributions, **given), title=title)
    if launch:
        app.launch(**{**launch_settings(), **options})
    return app


def open_exhibit(
    attributions: AttributionResult | str | Path,
    *,
    synset: Synset | str | Path | None = None,
    model: Any = None,
    rows: Any = None,
    queries: Any = None,
    tokenizer: Any = None,
    data_collator: DataCollator | None = None,
    revision: str | None = None,
    token: str | bool | None = None,
) -> Exhibit:
    """
    Exhibit of objects, folders or repositories on the Hub; `rows` and `queries` are datasets or saved folders.

    `attributions` may be a folder such as the demo's, with all the others beside the attributions.
    """
    given = {"synset": synset, "model": model, "rows": rows, "queries": queries}
    if not isinstance(attributions, AttributionResult):
        attributions, given = with_neighbours(attributions, given)
        attributions = AttributionResult.from_pretrained(attributions, revision=revision, token=token)
    synset = given["synset"]
    if synset is not None and not isinstance(synset, Synset):
        synset = Synset.from_pretrained(synset, token=token)
    attributor, beside = (None, None) if given["model"] is None else _attributor(given["model"], synset, token)
    if isinstance(tokenizer, str | Path):
        with folder_or_repository(tokenizer):
            tokenizer = AutoTokenizer.from_pretrained(str(tokenizer), token=token, trust_remote_code=False)
    return Exhibit(
        attributions,
        synset=synset,
        rows=saved_rows(given["rows"]),
        queries=saved_rows(given["queries"]),
        attributor=attributor,
        tokenizer=tokenizer or beside,
        data_collator=data_collator,
    )


def with_neighbours(attributions: str | Path, given: dict[str, Any]) -> tuple[str | Path, dict[str, Any]]:
    """Attributions and their parts; parts that are not given are taken from a folder such as the demo's."""
    folder = Path(attributions)
    if not (folder / ATTRIBUTIONS / CONFIG_FILE).is_file():
        return attributions, given
    beside = {name: folder / name for name in given if not (folder / name).is_symlink() and (folder / name).is_dir()}
    return folder / ATTRIBUTIONS, {name: beside.get(name) if v is None else v for name, v in given.items()}


def saved_rows(given: Any) -> Any:
    """A dataset, read from its folder if it is one."""
    if not isinstance(given, str | Path):
        return given
    loaded = without_paths(datasets.load_from_disk(str(given)), given)
    if not isinstance(loaded, datasets.Dataset):
        raise ValueError(f"{given} holds the splits {', '.join(map(str, loaded))}. Pass the dataset of one of them.")
    return loaded


def _attributor(model: Any, synset: Synset | None, token: str | bool | None) -> tuple[Attributor, Any]:
    """Attributor of a model, and the tokenizer that is saved with it."""
    if synset is None:
        raise ValueError("Predictions without clusters need the synset of the model. Pass `synset`.")
    if not isinstance(model, str | Path):
        return Attributor(model, synset, disable_tqdm=True), None
    build: Any = pipeline  # its overloads only have the tasks of transformers
    with folder_or_repository(model):
        given = {"model": str(model), "synset": synset, "token": token, "trust_remote_code": False}
        built = build("data-attribution", **given, disable_tqdm=True)
    return built.attributor, built.tokenizer


def _gradio() -> Any:
    try:
        import gradio
    except ImportError as error:
        raise ImportError('The explorer needs Gradio: `pip install "hf-rgm[explorer]"`.') from error
    return gradio


def _position(query: int) -> int | None:
    return None if query == ALL_QUERIES else query


def _html(section: Section) -> str:
    return fragment(section.to_html())


def _choices(names: Sequence[str]) -> list[tuple[str, int]]:
    return [(shortened(name, 80), index) for index, name in enumerate(names)]
