"""Distilling a synset: matching gradients, until it is done."""
