"""Mamba-2 from scratch: a state-space language model small enough to read in an evening."""
