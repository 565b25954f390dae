"""Results of attribution: scores, mixtures, models without some data."""
