"""
All plots. Every function draws on the `ax` it is given, or on a figure of its own that is not registered with pyplot,
and returns the axes: `ax.figure` shows it in a notebook, `ax.figure.savefig(path)` writes it.
"""

from hf_rgm.plots.check_plots import plot_inspection_curve, plot_matching_error, plot_predicted_against_actual
from hf_rgm.plots.score_plots import plot_bars, plot_heatmap, plot_synset_gallery

__all__ = [
    "plot_bars",
    "plot_heatmap",
    "plot_inspection_curve",
    "plot_matching_error",
    "plot_predicted_against_actual",
    "plot_synset_gallery",
]
