"""Online: what a synset says about a model: scores, replayed models, and the results to keep."""
