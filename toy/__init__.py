"""Toy model: training data, training and evaluation."""
