"""Agreement with retraining: correlations, subsets, budgets and the figures that are kept."""
