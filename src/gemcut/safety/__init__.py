"""Judges of text that need numpy alone: a lexicon, a linear model; personal data; the child-safety interface."""
