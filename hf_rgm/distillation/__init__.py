"""Distillation of a synset by matching gradients."""
